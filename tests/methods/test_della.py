"""DELLA: the chance of each rank, what becomes of the rest, and how the merge goes on; expectations over seeds."""

import math

import pytest
import torch

from mergetool import PlanError, merge_state_dicts
from mergetool.kernels.row_ranks import spread_by_rank_
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform
from tests.methods.test_ties import elect_and_merge

SHAPE = (200, 500)


def dropped(delta, method="della-linear", **more):
    """One model's task vector after dropping, on top of a base of zeros."""
    return merge_state_dicts(method, {"a": {"w": delta}}, {"w": torch.zeros_like(delta)}, **more)["w"]


def chances(delta, density, epsilon):
    """Every entry's chance, from its rank in its row."""
    ranks = delta.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
    return density - epsilon + 2 * epsilon * ranks / (delta.shape[1] - 1)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.7, 0.07), (0.25, 0.25), (0.6, 0.0)])
def test_each_tenth_of_the_ranks_is_kept_as_often_as_its_chance_says(density, epsilon):
    delta = uniform(SHAPE, "delta")
    kept, wanted = dropped(delta, density=density, epsilon=epsilon, rescale="none") != 0, None
    wanted = chances(delta, density, epsilon)
    for tenth in range(10):
        low, high = density - epsilon + 2 * epsilon * tenth / 10, density - epsilon + 2 * epsilon * (tenth + 1) / 10
        chosen = (wanted >= low) & (wanted <= high)
        mean, count = float(wanted[chosen].mean()), int(chosen.sum())
        assert abs(float(kept[chosen].double().mean()) - mean) < 4 * math.sqrt(mean * (1 - mean) / count) + 1e-9


def test_an_entry_is_dropped_or_divided_by_its_own_chance():
    delta = uniform(SHAPE, "delta")
    found = dropped(delta, density=0.5, epsilon=0.4)
    kept = found != 0
    expected = delta.double() / chances(delta, 0.5, 0.4)
    torch.testing.assert_close(found[kept].double(), expected[kept], rtol=1e-4, atol=0)  # draws have 16 bits


def test_the_mean_over_seeds_is_the_task_vector():
    delta = uniform((3, 40), "delta")
    draws = torch.stack([dropped(delta, density=0.5, epsilon=0.3, seed=seed) for seed in range(400)]).double()
    share = chances(delta, 0.5, 0.3)
    deviation = (draws.mean(0) - delta.double()) / (delta.double().abs() * ((1 - share) / share / 400).sqrt())
    assert float(deviation.abs().max()) < 4.5
    assert abs(float(deviation.mean())) < 4 / math.sqrt(120)


def test_l1_rescaling_keeps_the_l1_norm_of_the_whole_tensor():
    delta = uniform(SHAPE, "delta")
    found = dropped(delta, density=0.4, epsilon=0.15, rescale="l1")
    assert float(found.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-5)
    kept = found != 0
    ratio = (found[kept] / delta[kept]).double()
    assert float(ratio.max() - ratio.min()) < 1e-5  # one factor for all


@pytest.mark.parametrize("shape", [(500,), (1,), (6, 1), (4, 1, 5), ()])
def test_other_shapes_have_rows_too(shape):
    delta = uniform(shape, "delta")
    found = torch.stack([dropped(delta, density=0.5, epsilon=0.2, rescale="none", seed=s) for s in range(40)])
    assert bool(((found == 0) | (found == delta)).all())
    assert 0.3 < float((found != 0).double().mean()) < 0.7


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", ["della", "della-linear"])
def test_what_is_left_is_added_up_or_votes(method, normalize):
    base, models = toy_models("abc", exact=False)
    weights = (0.5, 2.0, 1.0)
    alone = [merge_state_dicts("della-linear", {name: models[name]}, base, density=0.5) for name in "abc"]
    left = [{n: one[n].double() - value.double() for n, value in base.items()} for one in alone]
    settings = {"density": 0.5, "weight": dict(zip("abc", weights, strict=True)), "scale": 0.7, "normalize": normalize}
    expected = {}
    for name, value in base.items():
        deltas = [one[name] for one in left]
        total = sum(w * delta for w, delta in zip(weights, deltas, strict=True)) / (sum(weights) if normalize else 1)
        update = elect_and_merge(deltas, weights, normalize) if method == "della" else total
        expected[name] = value.double() + 0.7 * update
    assert_near(merge_state_dicts(method, models, base, **settings), expected, tolerance=2e-6)


@pytest.mark.parametrize("method", ["della", "della-linear"])
def test_everything_kept_of_one_model_is_that_model(method):
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts(method, models, base, density=1.0, epsilon=0.4), models["a"])


@pytest.mark.parametrize(("density", "epsilon", "chance"), [(0.1, 0.15, "-0.05"), (0.9, 0.15, "1.05")])
def test_chances_outside_zero_to_one_are_refused(density, epsilon, chance):
    base, models = toy_models("a")
    with pytest.raises(PlanError, match=f"density {density} and epsilon {epsilon} make chances .*{chance}"):
        merge_state_dicts("della", models, base, density=density, epsilon=epsilon)


def scratch_like(x):
    return lambda name, dtype: torch.empty(x.shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_magnitudes_are_ranked_by_place(dtype):
    x = torch.tensor([[2.0, -1.0, 1.0, 0.0], [-0.0, 3.0, -3.0, float("inf")]], dtype=dtype)
    out = spread_by_rank_(x, torch.tensor([10, 11, 12, 13]), torch.zeros(2, 4, dtype=torch.int64), scratch_like(x))
    assert out.tolist() == [[13, 11, 12, 10], [10, 11, 12, 13]]


@pytest.mark.parametrize("length", [1, 2, 700, 9000])
@pytest.mark.parametrize(
    "rows", ["normal", "one step apart", "stored in 16 bits", "falling", "far from the largest", "equal"]
)
def test_ranks_are_those_of_whole_magnitudes(rows, length):
    x = uniform((3, length), rows)
    steps = torch.arange(length, dtype=torch.int32)
    made = {
        "one step apart": lambda: (torch.ones(3, length).view(torch.int32) + (x * 40).int()).view(torch.float32),
        "stored in 16 bits": lambda: (x + 1e-3).bfloat16().float() - (x / 9).bfloat16().float(),
        "falling": lambda: (torch.ones(3, length).view(torch.int32) - steps).view(torch.float32),
        "far from the largest": lambda: torch.cat([x * 1e-20, torch.full((3, 1), 1e10)], dim=1),
        "equal": lambda: torch.full((3, length), -0.5),
    }
    x = made[rows]() if rows in made else x
    found = spread_by_rank_(x, torch.arange(x.shape[1]), torch.empty(x.shape, dtype=torch.int64), scratch_like(x))
    assert torch.equal(found, x.abs().argsort(dim=1, stable=True).argsort(dim=1))
