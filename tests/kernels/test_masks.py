"""Masks without branches do what indexing by booleans does, to the bit."""

import pytest
import torch

from mergetool.kernels.masks import apply_, count_nonzero, mask_below, mask_equal, packed, unpack
from mergetool.testing.toys import uniform

FLOATS = (torch.float32, torch.float64)


def scratch(name, dtype):
    return torch.full((1000,), 77, dtype=dtype)  # rubbish, as reused buffers have


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_below_the_threshold_becomes_zero_whatever_it_was(dtype):
    values, scores = uniform((1000,), "values").to(dtype), uniform((1000,), "scores").abs().to(dtype)
    values[:3], scores[3] = torch.tensor([torch.nan, torch.inf, -0.0]), torch.nan
    expected = values.masked_fill(scores < 0.5, 0.0)
    found = apply_(values.clone(), mask_below(scores, 0.5, scratch))
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    assert found.view(whole).tolist() == expected.view(whole).tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_entries_are_counted_all_or_where_a_mask_keeps_them(dtype):
    values, groups = uniform((1000,), "values").to(dtype), torch.arange(1000).remainder(3).to(dtype)
    values[::2], values[1] = 0.0, torch.nan
    assert count_nonzero(values) == 500
    assert count_nonzero(values, mask_equal(groups, 1.0, scratch)) == int((values[groups == 1] != 0).sum())


@pytest.mark.parametrize("shape", [(1000,), (7, 13), (1,)])
def test_choices_survive_as_bits(shape):
    choice = (uniform(shape, "choice") > 0).int()
    bits = packed(choice)
    assert len(bits) == -(-choice.numel() // 8)
    assert torch.equal(unpack(bits, torch.full(shape, 77.0)), choice.float())
