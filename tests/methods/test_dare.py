"""DARE: which entries are dropped, what becomes of the rest, and how the merge goes on; expectations over seeds."""

import math
from itertools import pairwise

import pytest
import torch

from mergetool import PlanError, merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, plus, toy_base, toy_deltas, toy_models, uniform
from tests.methods.test_ties import elect_and_merge

SIZE = 100_000


def dropped(delta, name="a", tensor="w", method="dare-linear", **more):
    """One model's task vector after dropping, on top of a base of zeros."""
    return merge_state_dicts(method, {name: {tensor: delta}}, {tensor: torch.zeros_like(delta)}, **more)[tensor]


def kept(density, **more):
    """Which of many entries are kept."""
    return dropped(torch.ones(SIZE), density=density, rescale="none", **more) != 0


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_everything_kept_of_one_model_is_that_model(method):
    base, models = toy_models("a")
    for rescale in ("1/p", "l1", "none"):
        assert_same_bytes(merge_state_dicts(method, models, base, density=1.0, rescale=rescale), models["a"])


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_the_density_within_four_sigma(density):
    sigma = math.sqrt(SIZE * density * (1 - density))
    for seed in range(5):
        assert abs(int(kept(density, seed=seed).sum()) - density * SIZE) < 4 * sigma


def test_an_entry_is_dropped_or_divided_by_the_share_kept():
    delta = uniform((SIZE,), "delta")
    found = dropped(delta, density=0.3)
    chosen = found != 0
    assert 0 < int(chosen.sum()) < SIZE
    torch.testing.assert_close(found[chosen], delta[chosen] / 0.3, rtol=2e-5, atol=0)  # draws have 16 bits


def test_without_rescaling_the_entries_kept_are_as_they_were():
    delta = uniform((SIZE,), "delta")
    found = dropped(delta, density=0.3, rescale="none")
    assert found[found != 0].equal(delta[found != 0])


def test_l1_rescaling_keeps_the_l1_norm_of_every_tensor_and_model():
    base, models = toy_models("ab", exact=False)
    for name in "ab":
        merged = merge_state_dicts("dare-linear", {name: models[name]}, base, density=0.5, rescale="l1")
        for key, value in base.items():
            if value.numel() > 1:
                after, before = (
                    (merged[key] - value).double().abs().sum(),
                    (models[name][key] - value).double().abs().sum(),
                )
                assert float(after) == pytest.approx(float(before), rel=1e-5)


def test_l1_rescaling_of_two_models_is_that_of_each():
    base, models = toy_models("ab", exact=False)
    each = [merge_state_dicts("dare-linear", {n: models[n]}, base, rescale="l1") for n in "ab"]
    expected = {n: each[0][n].double() + each[1][n].double() - value.double() for n, value in base.items()}
    assert_near(merge_state_dicts("dare-linear", models, base, rescale="l1"), expected, tolerance=1e-6)


def test_l1_rescaling_of_a_tensor_that_lost_everything_leaves_the_base():
    found = [dropped(torch.ones(1), density=0.5, rescale="l1", seed=seed).item() for seed in range(20)]
    assert set(found) == {0.0, 1.0}


def test_the_mean_over_seeds_is_the_task_vector_and_the_variance_the_papers():
    """E = tau and Var = tau^2 p / (1 - p), p the share dropped, over 400 seeds and within four sigma of each."""
    delta = uniform((300,), "delta")
    draws = torch.stack([dropped(delta, density=0.25, seed=seed) for seed in range(400)]).double()
    deviation = (draws.mean(0) - delta.double()) / (delta.double().abs() * math.sqrt(3 / 400))
    assert float(deviation.abs().max()) < 4.5  # the largest of 300
    assert abs(float(deviation.mean())) < 4 / math.sqrt(300)
    variance = draws.var(0) / delta.double() ** 2
    assert float(variance.mean()) == pytest.approx(3.0, rel=0.05)


def test_what_is_kept_at_a_small_density_is_kept_at_a_larger_one():
    masks = [kept(density) for density in (0.05, 0.2, 0.5, 0.9)]
    for smaller, larger in pairwise(masks):
        assert bool((smaller <= larger).all())


@pytest.mark.parametrize("change", [{"name": "b"}, {"tensor": "v"}, {"seed": 1}])
def test_models_tensors_and_seeds_draw_independently(change):
    one, two = kept(0.3), kept(0.3, **change)
    both = int((one & two).sum())
    assert abs(both - 0.09 * SIZE) < 4 * math.sqrt(SIZE * 0.09 * 0.91)


def test_a_models_draws_do_not_depend_on_the_other_models():
    base, models = toy_models("abc")
    alone = [merge_state_dicts("dare-linear", {name: models[name]}, base) for name in "abc"]
    expected = {n: sum(one[n].double() for one in alone) - 2 * value.double() for n, value in base.items()}
    assert_near(merge_state_dicts("dare-linear", models, base), expected, tolerance=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_dare_linear_adds_what_is_left_with_weights_and_scale(normalize):
    base, models = toy_models("ab", exact=False)
    left = {
        name: {key: value.double() - base[key].double() for key, value in one.items()}
        for name in "ab"
        for one in [merge_state_dicts("dare-linear", {name: models[name]}, base, density=0.4)]
    }
    options = {"density": 0.4, "weight": {"a": 0.5, "b": -2.0}, "scale": 0.3, "normalize": normalize}
    factor = 0.3 / -1.5 if normalize else 0.3
    expected = {n: v.double() + factor * (0.5 * left["a"][n] - 2.0 * left["b"][n]) for n, v in base.items()}
    assert_near(merge_state_dicts("dare-linear", models, base, **options), expected, tolerance=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0)])
def test_dare_ties_lets_what_is_left_vote(normalize, weights):
    base, models = toy_models("abc")
    left = [
        {key: value.double() - base[key].double() for key, value in one.items()}
        for name in "abc"
        for one in [merge_state_dicts("dare-ties", {name: models[name]}, base, density=0.5, normalize=False)]
    ]
    by_name = dict(zip("abc", weights, strict=True))
    merged = merge_state_dicts("dare-ties", models, base, density=0.5, weight=by_name, scale=0.7, normalize=normalize)
    expected = {
        name: value.double() + 0.7 * elect_and_merge([delta[name] for delta in left], weights, normalize)
        for name, value in base.items()
    }
    assert_near(merged, expected, tolerance=1e-6)


def test_both_members_of_the_family_drop_the_same_entries():
    delta = uniform((SIZE,), "delta")
    assert dropped(delta, density=0.3, method="dare-ties").equal(dropped(delta, density=0.3))


def test_densities_can_differ_by_model():
    base, delta = toy_base(), toy_deltas("a")
    models = {"a": plus(base, delta), "b": base}
    merged = merge_state_dicts("dare-linear", models, base, density={"a": 1.0, "b": 0.1})
    assert_same_bytes(merged, models["a"])


def test_a_density_below_the_resolution_of_the_draws_stays_finite():
    found = dropped(torch.ones(SIZE), density=1e-12)
    assert bool(found.isfinite().all())
    assert set(found[found != 0].tolist()) <= {2.0**16}


def test_weights_that_cancel_cannot_be_normalised():
    base, models = toy_models("ab")
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts("dare-linear", models, base, weight={"a": 1.0, "b": -1.0}, normalize=True)
