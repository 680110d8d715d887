"""CABS: every block against sorting, disjoint by construction, and by hand."""

import pytest
import torch

from mergetool import MergeError, merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform


def kept(rows, taken, size, density):
    """Places that a model keeps, row by row, block by block, entry by entry."""
    mask = torch.zeros_like(taken)
    for y, row in enumerate(rows.abs()):
        for begin in range(0, len(row), size):
            block = row[begin : begin + size]
            order = sorted(range(len(block)), key=lambda x: -float(block[x]))
            left = [x for x in order if not taken[y, begin + x]]
            for x in left[: max(1, round(density * len(block)))]:
                mask[y, begin + x] = True
    return mask


def naive(deltas, size, densities):
    """What is left of each task vector."""
    rows = [delta.reshape(1 if delta.dim() < 2 else len(delta), -1) for delta in deltas]
    taken, left = torch.zeros(rows[0].shape, dtype=torch.bool), []
    for row, density in zip(rows, densities, strict=True):
        mask = kept(row, taken, size, density)
        taken |= mask
        left.append(torch.where(mask, row, 0.0).view(deltas[0].shape))
    return left


def merged(*deltas, **settings):
    models = {f"m{i}": {"w": torch.as_tensor(delta)} for i, delta in enumerate(deltas)}
    base = {"w": torch.zeros(models["m0"]["w"].shape)}
    return merge_state_dicts("cabs", models, base, **settings)["w"]


@pytest.mark.parametrize("block", [1, 4, 5, 1000])
@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_models_choose_one_after_the_other(block, rescale, dtype):
    base, models = toy_models("abc", exact=False)
    densities, weights = (0.5, 0.25, 0.4), (0.7, 1.5, 0.4)
    each = {"density": dict(zip("abc", densities, strict=True)), "weight": dict(zip("abc", weights, strict=True))}
    found = merge_state_dicts("cabs", models, base, block=block, rescale=rescale, scale=0.6, dtype=dtype, **each)
    expected = {}
    for name, value in base.items():
        deltas = [models[m][name].double() - value.double() for m in "abc"]
        left = naive(deltas, block, densities) if value.numel() else deltas
        if rescale == "l1":
            left = [x * (d.abs().sum() / x.abs().sum() if x.any() else 1.0) for x, d in zip(left, deltas, strict=True)]
        expected[name] = value.double() + 0.6 * sum(w * x for w, x in zip(weights, left, strict=True))
    assert_near(found, expected, tolerance=1e-6)


def test_the_first_model_chooses_freely_and_the_next_one_among_what_is_left():
    a, b = [4.0, 3.0, 2.0, 1.0, 9.0, 8.0], [9.0, 1.0, 2.0, 8.0, 7.0, 3.0]
    assert merged(a, b, block=4, density=0.5).tolist() == [4.0, 3.0, 2.0, 8.0, 9.0, 3.0]
    assert merged(b, a, block=4, density=0.5).tolist() == [9.0, 3.0, 2.0, 8.0, 7.0, 8.0]


def test_exactly_its_share_of_every_block_is_kept_of_equal_changes_too():
    delta = torch.cat([torch.ones(64), uniform((64,), "delta")]).repeat(2, 3)
    found = merged(delta, block=64, density=0.25)
    assert set((found != 0).view(-1, 64).sum(1).tolist()) == {16}
    assert found[0, :16].tolist() == [1.0] * 16


def test_a_model_of_weight_zero_takes_nothing_from_the_next():
    a, b = uniform((3, 40), "a"), uniform((3, 40), "b")
    assert merged(a, b, weight={"m0": 0.0, "m1": 1.0}).equal(merged(b))


def test_blocks_as_large_as_what_is_kept_keep_everything():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("cabs", models, base, density=1.0), models["a"])


def test_what_is_not_finite_is_not_dropped_with_the_rest():
    a, b = uniform((1, 40), "a"), uniform((1, 40), "b")
    b[0, int(a.abs().argmax())] = float("nan")  # where the first model has chosen
    with pytest.raises(MergeError, match="model 'm1'"):
        merged(a, b)
