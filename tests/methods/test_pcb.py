"""PCB-Merging against the authors' formula in float64, and what happens at the ends of it."""

import pytest
import torch

from mergetool import MergeError, merge_state_dicts
from mergetool.kernels import competition
from mergetool.methods.families import ranks
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform


def clamped(x, low, high):
    """Between two of the values in ascending order; `high` is a share from above."""
    ordered, size = x.sort().values, x.numel()
    return x.clamp(ordered[int(size * low)], ordered[max(0, int(size * (1 - high) - 1))])


def spread(x):
    return (x - x.min()) / ((x.max() - x.min()) or 1.0)


def shares(scores, density):
    """From 0 at the threshold to 1 at the top; where those are one, 1 at the top."""
    kept = clamped(scores, 1 - density, 0.0)
    return spread(kept) if kept.max() > kept.min() else (scores >= kept).double()


def naive(deltas, density, weights, clip=1e-4):
    """The merged task vector of flat ones (n, d)."""
    sizes = torch.stack([clamped(delta.abs(), clip, clip) for delta in deltas])
    scores = [
        torch.exp(len(deltas) * spread(size) ** 2) * torch.tanh(delta * deltas.sum(0))
        for size, delta in zip(sizes, deltas, strict=True)
    ]
    counted = torch.stack([shares(score, share) for score, share in zip(scores, density, strict=True)])
    values = deltas.sign() * sizes * torch.tensor(weights, dtype=torch.float64)[:, None]
    return (values * counted).sum(0) / counted.sum(0).clamp(min=1e-12)


def merged(*deltas, **settings):
    models = {f"m{i}": {"w": torch.as_tensor(delta)} for i, delta in enumerate(deltas)}
    base = {"w": torch.zeros(len(deltas[0]), dtype=next(iter(models.values()))["w"].dtype)}
    return merge_state_dicts("pcb", models, base, **{"scale": 1.0, **settings})["w"]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [(0.1, 0.5, 1.0), (0.02, 0.02, 0.02)])
def test_it_is_the_authors_formula(scope, density):
    base, models = toy_models("abc", exact=False)
    weights = (0.7, 1.5, 0.4)
    found = merge_state_dicts(
        "pcb",
        models,
        base,
        density=dict(zip("abc", density, strict=True)),
        weight=dict(zip("abc", weights, strict=True)),
        scale=0.6,
        scope=scope,
        dtype="float64",
    )
    deltas = {
        name: torch.stack([(models[m][name].double() - v.double()).flatten() for m in "abc"])
        for name, v in base.items()
    }
    if scope == "model":
        together = naive(torch.cat(list(deltas.values()), 1), density, weights)
        parts = dict(zip(deltas, together.split([delta.shape[1] for delta in deltas.values()]), strict=True))
    else:
        parts = {name: naive(delta, density, weights) if delta.numel() else delta[0] for name, delta in deltas.items()}
    expected = {name: value.double() + 0.6 * parts[name].view(value.shape) for name, value in base.items()}
    assert_near(found, expected, tolerance=1e-6)


def test_the_hyperbolic_tangent_of_what_is_tiny_is_just_that():
    """So that it may be left out, whatever else a slice holds."""
    bits = torch.arange(0, 114 << 23, 10_007, dtype=torch.int32).view(torch.float32)  # up to 2**-13
    tiny = torch.cat([bits, -bits])
    assert torch.equal(competition._tanh_(tiny.clone()), tiny)
    assert torch.equal(torch.tanh(tiny), tiny)
    mixed = torch.cat([tiny[:100], torch.tensor([0.5, torch.nan])])
    torch.testing.assert_close(competition._tanh_(mixed.clone()), torch.tanh(mixed), rtol=0, atol=0, equal_nan=True)


def test_the_smallest_and_the_largest_changes_do_not_differ():
    deltas = [uniform((20_000,), name).double() for name in "ab"]
    expected = naive(torch.stack(deltas), (0.3, 0.3), (1.0, 1.0), clip=0.01)
    torch.testing.assert_close(merged(*deltas, density=0.3, clip=0.01), expected)


def test_ranks_found_by_a_sample_and_by_counting_all_are_the_same(monkeypatch):
    deltas = [uniform((300_000,), name) ** 3 for name in "ab"]
    sampled = merged(*deltas)
    monkeypatch.setattr(ranks, "_MOST_KEPT", 0)
    assert merged(*deltas).equal(sampled)


def test_scores_below_zero_can_be_among_those_that_count():
    rival = torch.full((1000,), 5.0, dtype=torch.float64)
    weak = -uniform((1000,), "weak").double().abs()  # against the sum everywhere: no score above 0
    found = merged(weak, rival, density=0.3, clip=0.0)
    torch.testing.assert_close(found, naive(torch.stack([weak, rival]), (0.3, 0.3), (1.0, 1.0), clip=0.0))
    mixed = torch.where(torch.arange(1000) % 10 == 0, -weak, weak)  # a tenth is above 0, three tenths count
    found = merged(mixed, rival, density=0.3, clip=0.0)
    torch.testing.assert_close(found, naive(torch.stack([mixed, rival]), (0.3, 0.3), (1.0, 1.0), clip=0.0))


def test_a_small_change_that_agrees_wins_over_a_large_one_that_does_not():
    found = merged([1.0, 0.5, 0.1, 0.1], [1.0, -2.0, 0.1, 0.1], [1.0, -2.0, 0.1, 0.1], density=0.5, clip=0.0)
    assert found[1] == -2.0


def test_copies_give_the_model_but_for_the_entry_of_the_lowest_score():
    delta = uniform((100,), "delta").double()
    found = merged(delta, delta, density=1.0, clip=0.0)
    lowest = delta.abs().argmin()
    assert found[lowest] == 0.0
    found[lowest] = delta[lowest]
    torch.testing.assert_close(found, delta)


def test_where_all_scores_are_equal_all_count():
    assert merged([1.0, -1.0], [1.0, -1.0]).tolist() == [1.0, -1.0]


def test_many_models_stay_within_float32():
    deltas = [1e-4 * uniform((500,), f"m{i}") for i in range(100)]
    expected = naive(torch.stack(deltas).double(), (0.1,) * 100, (1.0,) * 100)
    torch.testing.assert_close(merged(*deltas).double(), expected, rtol=1e-3, atol=1e-7)


def test_models_that_equal_the_base_give_the_base():
    base, _ = toy_models("a", exact=False)
    assert_same_bytes(merge_state_dicts("pcb", dict.fromkeys("ab", base), base), base)


def test_a_value_that_is_not_finite_is_told_where_it_is_though_ranks_spread_it():
    """Ranks are those of the whole model: the tensor that is merged first shows what is wrong with another."""
    base = {name: torch.zeros(8) for name in "vw"}
    models = {model: {name: torch.arange(8.0) + 1 for name in "vw"} for model in "ab"}
    models["b"]["w"][3] = torch.nan
    with pytest.raises(MergeError, match="not finite in model 'b' at flat index 3 of w"):
        merge_state_dicts("pcb", models, base)
