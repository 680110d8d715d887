"""Breadcrumbs: the middle of a task vector, against sorting in float64, and cases that can be checked by hand."""

import pytest
import torch

from mergetool import PlanError, merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform
from tests.methods.test_ties import elect_and_merge


def middle(delta, density, gamma):
    """Entries by rank: the largest `gamma` go, the next `density` stay."""
    size = delta.numel()
    if density == 1.0 or size == 0:
        return delta
    kept = max(1, int(density * size))
    dropped = min(int(gamma * size), size - kept)
    order = delta.abs().flatten().argsort(descending=True)
    out = torch.zeros_like(delta).flatten()
    chosen = order[dropped : dropped + kept]
    out[chosen] = delta.flatten()[chosen]
    return out.reshape(delta.shape)


def cut(values, **settings):
    """What breadcrumbs leaves of one task vector."""
    delta = torch.tensor(values)
    return merge_state_dicts("breadcrumbs", {"a": {"w": delta}}, {"w": torch.zeros_like(delta)}, **settings)["w"]


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs-ties"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_it_is_the_middle_of_each_task_vector(method, gamma, rescale):
    base, models = toy_models("abc", exact=False)
    density, weights = (0.5, 0.2, 1.0), (0.7, 1.5, 0.4)
    merged = merge_state_dicts(
        method,
        models,
        base,
        density=dict(zip("abc", density, strict=True)),
        weight=dict(zip("abc", weights, strict=True)),
        gamma=gamma,
        rescale=rescale,
        normalize=True,
        scale=0.6,
    )
    expected = {}
    for name, value in base.items():
        deltas = [models[m][name].double() - value.double() for m in "abc"]
        left = [middle(delta, share, gamma) for delta, share in zip(deltas, density, strict=True)]
        if rescale == "l1" and value.numel():
            left = [x * delta.abs().sum() / x.abs().sum() for x, delta in zip(left, deltas, strict=True)]
        mean = sum(w * x for w, x in zip(weights, left, strict=True)) / sum(weights)
        update = elect_and_merge(left, weights, True) if method == "breadcrumbs-ties" else mean
        expected[name] = value.double() + 0.6 * update
    assert_near(merged, expected, tolerance=1e-6)


def test_the_largest_and_the_smallest_go():
    assert cut([5.0, -1.0, 3.0, -4.0, 2.0], density=0.4, gamma=0.2).tolist() == [0.0, 0.0, 3.0, -4.0, 0.0]


def test_without_gamma_the_largest_stay():
    assert cut([5.0, -1.0, 3.0, -4.0, 2.0], density=0.4, gamma=0.0).tolist() == [5.0, 0.0, 0.0, -4.0, 0.0]


def test_where_both_shares_are_more_than_the_whole_fewer_large_ones_go():
    assert cut([5.0, -1.0, 3.0, -4.0, 2.0], density=0.8, gamma=0.6).tolist() == [0.0, -1.0, 3.0, -4.0, 2.0]


def test_something_is_kept_of_the_smallest_tensor():
    assert cut([2.0], density=0.2, gamma=0.5).tolist() == [2.0]


@pytest.mark.parametrize(("boundary", "kept"), [("keep", [6, 7]), ("drop", [2])])
def test_entries_at_a_threshold_stay_or_go_together(boundary, kept):
    values = [9.0, 4.0, -4.0, 3.0, 3.0, 2.0, -2.0, 1.0, 1.0, 1.0]  # wanted: ranks 3 to 6, from a 4 to a 2
    found = cut(values, density=0.4, gamma=0.2, boundary=boundary)
    assert int((found != 0).sum()) in kept
    assert set(found.abs().tolist()) <= {0.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize("values", [[1.0] * 20_000, [4.0] * 4_000 + [2.0] * 10_000 + [1.0] * 6_000])
def test_random_keeps_the_share_wanted_of_equal_entries(values):
    found = cut(values, density=0.5, gamma=0.1, boundary="random")
    assert abs(int((found != 0).sum()) - 10_000) < 300
    if len(set(values)) > 1:
        assert abs(int((found == 4.0).sum()) - 2_000) < 150  # half of the fours are among the tenth that goes


def test_a_large_tensor_is_cut_by_a_sample_just_as_exactly():
    delta = uniform((700, 500), "delta")
    merged = merge_state_dicts("breadcrumbs", {"a": {"w": delta}}, {"w": torch.zeros_like(delta)}, gamma=0.01)
    assert merged["w"].equal(middle(delta, 0.2, 0.01))


def test_everything_kept_of_one_model_is_that_model():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("breadcrumbs", models, base, density=1.0, boundary="drop"), models["a"])


def test_weights_that_cancel_cannot_be_normalised_in_a_sum_but_in_a_vote():
    base, models = toy_models("ab")
    settings = {"weight": {"a": 1.0, "b": -1.0}, "normalize": True}
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts("breadcrumbs", models, base, **settings)
    merge_state_dicts("breadcrumbs-ties", models, base, **settings)
