"""Arcee Fusion: importances against their definition in float64, thresholds, and what is taken over."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform


def importances(base, model):
    """By the definition, without tricks, in float64."""
    p, q = model.double().softmax(-1), base.double().softmax(-1)
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    return (model.double() - base.double()).abs() * divergence


def fused(base, model, scores):
    order = scores.flatten().sort().values
    first, median, third = (order[int(share * (len(order) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where(scores >= median + 1.5 * (third - first), model, base), median + 1.5 * (third - first)


@pytest.mark.parametrize("size", [0.3, 0.01])
@pytest.mark.parametrize("shape", [(40, 60), (500,), (6, 4, 3, 5), (700, 600)])
def test_changes_of_outlying_importance_are_taken_over(size, shape):
    base = uniform(shape, "base")
    model = base + size * uniform(shape, "delta") ** 3  # with outliers
    merged = merge_state_dicts("arcee-fusion", {"a": {"w": model}}, {"w": base})["w"]
    scores = importances(base, model)
    expected, threshold = fused(base, model, scores)
    clear = (scores / threshold - 1).abs() > 1e-3  # not decided by rounding
    assert clear.double().mean() > 0.99
    torch.testing.assert_close(merged[clear], expected[clear], rtol=0, atol=2e-7)
    assert 0.0 < float((merged != base).double().mean()) < 0.25


def test_small_fine_tunes_are_not_decided_by_rounding():
    """Changes of 1e-4 make divergences of 5e-9, less than sums of logarithms of probabilities resolve in float32."""
    base = uniform((64, 512), "base")
    model = base + 1e-4 * uniform((64, 512), "delta")
    merged = merge_state_dicts("arcee-fusion", {"a": {"w": model}}, {"w": base})["w"]
    expected, _ = fused(base, model, importances(base, model))
    assert ((merged != base) == (expected != base)).double().mean() > 0.995


def test_a_model_that_changed_nothing_leaves_the_base():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("arcee-fusion", {"a": base}, base), base)
    assert_near(
        {"s": merge_state_dicts("arcee-fusion", models, base)["logit_scale"]}, {"s": models["a"]["logit_scale"]}
    )
