"""Trimming and sign consensus without masks, against masks in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.kernels.consensus import agreeing_sum_, keep_largest_
from mergetool.testing.toys import uniform

FLOATS = (torch.float32, torch.float64)


def agreeing(values, weights, *, normalize):
    """The weighted sum (mean) of the values that have the sign of the weighted total."""
    weighted = torch.stack([w * value.double() for w, value in zip(weights, values, strict=True)])
    agree = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    total = torch.where(agree, weighted, 0.0).sum(0)
    count = torch.where(agree, torch.tensor(weights, dtype=torch.float64)[:, None], 0.0).sum(0)
    return total / torch.where(count == 0, 1.0, count) if normalize else total


def found(values, weights, *, normalize):
    def scratch(place, dtype):  # with rubbish in it, as reused buffers have
        return torch.full_like(values[0], float("nan"), dtype=dtype)

    return agreeing_sum_([value.clone() for value in values], weights, normalize=normalize, scratch=scratch)


def test_entries_that_disagree_with_the_elected_sign_do_not_count():
    values = [torch.tensor([3.0, -1.0]), torch.tensor([1.0, 4.0])]
    assert found(values, (1.0, 1.0), normalize=True).tolist() == [2.0, 4.0]
    assert found(values, (1.0, 1.0), normalize=False).tolist() == [4.0, 4.0]


def test_one_large_value_outvotes_two_small_ones():
    values = [torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([5.0])]
    assert found(values, (1.0, 1.0, 1.0), normalize=True).tolist() == [5.0]
    assert found(values, (3.0, 3.0, 1.0), normalize=True).tolist() == [-1.0]


def test_no_majority_gives_zero():
    values = [torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])]
    assert found(values, (1.0, 1.0), normalize=True).tolist() == [0.0, 0.0]


def test_a_negative_weight_turns_a_value_round_before_the_vote():
    values = [torch.tensor([3.0]), torch.tensor([-2.0])]
    assert found(values, (1.0, -0.5), normalize=False).tolist() == [4.0]
    assert found(values, (1.0, -0.5), normalize=True).tolist() == [8.0]  # (3 + 1) / (1 - 0.5)


def test_weights_that_agree_but_cancel_do_not_divide():
    values = [torch.tensor([3.0]), torch.tensor([-2.0])]
    assert found(values, (1.0, -1.0), normalize=True).tolist() == [5.0]


def test_a_weight_of_zero_takes_no_part():
    values = [torch.tensor([3.0, -1.0]), torch.tensor([-9.0, 9.0])]
    assert found(values, (1.0, 0.0), normalize=True).tolist() == [3.0, -1.0]


def test_tiny_weights_still_divide():
    values = [torch.tensor([3.0]), torch.tensor([1.0])]
    assert found(values, (1e-20, 1e-20), normalize=True).tolist() == pytest.approx([2.0], rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_dtype_is_that_of_the_values(dtype):
    assert found([torch.ones(2, dtype=dtype)], (1.0,), normalize=True).dtype == dtype


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_small_whole_numbers_give_what_masks_give(data):
    size = data.draw(st.integers(1, 8))
    num_models = data.draw(st.integers(1, 4))
    vector = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    values = [torch.tensor(data.draw(vector), dtype=torch.float32) for _ in range(num_models)]
    weights = tuple(data.draw(st.sampled_from([1.0, 2.0, 0.5, 0.0, -1.0, -2.0])) for _ in range(num_models))
    normalize = data.draw(st.booleans())
    expected = agreeing(values, weights, normalize=normalize)
    torch.testing.assert_close(found(values, weights, normalize=normalize).double(), expected, rtol=1e-6, atol=1e-6)


def test_any_values_give_what_masks_give():
    values = [uniform((5_000,), name) for name in "abcd"]
    for weights in ((1.0, 1.0, 1.0, 1.0), (0.5, 2.0, 0.25, 1.0), (1.0, -0.5, 0.25, 0.1)):
        for normalize in (True, False):
            expected = agreeing(values, weights, normalize=normalize)
            error = (found(values, weights, normalize=normalize).double() - expected).abs()
            assert float((error / (1 + expected.abs())).max()) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inclusive", [True, False])
def test_entries_below_the_threshold_become_zero_and_others_stay_to_the_bit(dtype, inclusive):
    x = (uniform((2_000,), "x").to(dtype) * 50).round() / 3
    for threshold in (0.0, 1 / 3, float(x[7].abs()), float(x.abs().max())):
        expected = torch.where(x.abs() >= threshold if inclusive else x.abs() > threshold, x, 0.0)
        assert keep_largest_(x.clone(), threshold, inclusive=inclusive).equal(expected)


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_neighbouring_floats_fall_on_either_side_of_a_threshold(dtype, number):
    for value in map(number, (1.0, 1e-30, np.finfo(number).smallest_subnormal, np.finfo(number).max)):
        below = np.nextafter(value, number(0))
        x = torch.tensor(np.array([value, -value, below, -below], dtype=number))
        assert x.dtype == dtype
        assert keep_largest_(x.clone(), float(value), inclusive=True).tolist() == [value, -value, 0.0, 0.0]
        assert keep_largest_(x.clone(), float(below), inclusive=False).tolist() == [value, -value, 0.0, 0.0]


def test_trimming_happens_in_place():
    x = torch.tensor([1.0, -3.0])
    assert keep_largest_(x, 2.0, inclusive=True) is x
    assert x.tolist() == [0.0, -3.0]
