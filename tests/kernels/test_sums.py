"""Sums in float64 are torch's own, to the bit."""

import pytest
import torch

from mergetool.kernels.sums import all_finite, wide_row_sums, wide_sum
from mergetool.testing.toys import uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_the_sums_of_the_widened_numbers(dtype):
    values = uniform((70, 1000), "values").to(dtype)

    def scratch(name, wanted):
        return torch.full_like(values, 77, dtype=wanted)

    assert torch.equal(wide_sum(values, scratch), values.sum(dtype=torch.float64))
    assert torch.equal(wide_row_sums(values, scratch), values.sum(-1, dtype=torch.float64, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_what_is_not_finite_is_found_and_large_numbers_are_no_infinities(dtype):
    large = torch.full((1000,), 60000).to(dtype)
    assert all_finite(large)  # whose sum is none in float16
    assert all_finite(torch.zeros(0, dtype=dtype))
    if dtype.is_floating_point:
        for wrong in (float("nan"), float("inf"), -float("inf")):
            large[500] = wrong
            assert not all_finite(large)
        assert not all_finite(torch.tensor([float("inf"), -float("inf"), 1.0], dtype=dtype))
