"""One change for many experts: EMR's and TALL's formulas entry by entry, and masks as bits."""

import pytest
import torch

from mergetool.kernels.unified import elected, in_step, its_own, packed, summed, unpacked


@pytest.fixture
def changes():
    torch.manual_seed(0)
    drawn = [torch.randn(7, 5) for _ in range(4)]
    drawn[0][0, :3] = torch.tensor([1.0, -2.0, 0.0])
    for other, values in zip(drawn[1:], ([-1.0, 2.0, 0.0], [0.0] * 3, [0.0] * 3), strict=True):
        other[0, :3] = torch.tensor(values)
    return drawn


def test_the_elected_change_has_the_sign_of_the_sum_and_the_largest_size_of_those_in_step(changes):
    found, masks = elected(changes), [in_step(change, elected(changes)) for change in changes]
    for row in range(7):
        for column in range(5):
            values = [change[row, column].item() for change in changes]
            flag = 1 if sum(values) > 0 else -1
            agreeing = [abs(value) for value in values if value * flag > 0]
            assert found[row, column].item() == flag * max(agreeing, default=0.0)
            assert [mask[row, column].item() for mask in masks] == [value * flag > 0 for value in values]
    assert found[0, :3].tolist() == [-1.0, -2.0, 0.0]  # opposites: minus is elected


@pytest.mark.parametrize("margin", [0.0, 0.4, 1.0])
def test_an_entry_is_an_experts_own_where_it_exceeds_what_others_add(changes, margin):
    total = summed(changes)
    for change in changes:
        found = its_own(change, total, margin)
        for own, whole, kept in zip(change.flatten().tolist(), total.flatten().tolist(), found.flatten(), strict=True):
            assert kept == (abs(own) > margin * abs(whole - own))
    assert not its_own(torch.zeros(3), torch.ones(3), 0.0).any()


@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 5), (2, 3, 4), (0, 4)])
def test_masks_come_back_from_their_bits(shape):
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.5
    bits = packed(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, shape), mask)
