"""Adaptive thresholds, against means and deviations in float64."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform


def outstanding(deltas, deviations):
    """What is left of one task vector: (all its tensors) the same threshold for each."""
    sizes = torch.cat([delta.flatten() for delta in deltas]).abs()
    spread = sizes.std(unbiased=False)
    threshold = sizes.mean() + deviations * spread if spread > 1e-3 * sizes.mean() else 0.0
    return [torch.where(delta.abs() > threshold, delta, 0.0) for delta in deltas]


def left(delta, **settings):
    return merge_state_dicts("adaptive", {"a": {"w": delta}}, {"w": torch.zeros_like(delta)}, **settings)["w"]


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_what_stands_out_is_added_up(scope, rescale):
    base, models = toy_models("abc", exact=False)
    base, *states = ({k: v for k, v in state.items() if v.numel()} for state in (base, *models.values()))
    deviations, weights = (0.5, -0.3, 1.1), (0.7, 1.5, 0.4)
    each = {"deviations": dict(zip("abc", deviations, strict=True)), "weight": dict(zip("abc", weights, strict=True))}
    found = merge_state_dicts(
        "adaptive", dict(zip("abc", states, strict=True)), base, scope=scope, rescale=rescale, scale=0.6, **each
    )
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in base.items()}
    for state, c, weight in zip(states, deviations, weights, strict=True):
        deltas = [state[name].double() - value.double() for name, value in base.items()]
        kept = outstanding(deltas, c) if scope == "model" else [outstanding([delta], c)[0] for delta in deltas]
        if rescale == "l1":
            before, after = (torch.stack([x.abs().sum() for x in each]) for each in (deltas, kept))
            before, after = (x.sum().expand(len(x)) if scope == "model" else x for x in (before, after))
            kept = [x * (b / a if a else 1.0) for x, b, a in zip(kept, before, after, strict=True)]
        for name, x in zip(base, kept, strict=True):
            total[name] += weight * x
    assert_near(found, {name: value.double() + 0.6 * total[name] for name, value in base.items()}, tolerance=1e-6)


def test_how_much_stays_depends_on_the_distribution():
    flat = uniform((10_000,), "delta")
    peaked = flat**9
    assert abs(float((left(flat) != 0).float().mean()) - (1 - 0.5 - 12**-0.5)) < 0.02
    assert float((left(peaked) != 0).float().mean()) < 0.15


def test_far_below_the_mean_everything_stays():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("adaptive", models, base, deviations=-100.0), models["a"])


@pytest.mark.parametrize("value", [1.0, 0.3, 1e-7])
def test_equal_changes_all_stay(value):
    assert left(torch.full((10,), value)).equal(torch.full((10,), value))
