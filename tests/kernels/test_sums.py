"""Sums in float64 are torch's own, to the bit."""

import pytest
import torch

from mergetool.kernels.sums import wide_row_sums, wide_sum
from mergetool.testing.toys import uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_the_sums_of_the_widened_numbers(dtype):
    values = uniform((70, 1000), "values").to(dtype)

    def scratch(name, wanted):
        return torch.full_like(values, 77, dtype=wanted)

    assert torch.equal(wide_sum(values, scratch), values.sum(dtype=torch.float64))
    assert torch.equal(wide_row_sums(values, scratch), values.sum(-1, dtype=torch.float64, keepdim=True))
