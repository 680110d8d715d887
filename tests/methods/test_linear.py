"""Weighted averages, against sums in float64 and cases that can be checked by hand."""

import pytest
import torch

from mergetool import PlanError, merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, minus, plus, times, toy_base, toy_deltas, toy_models


def averaged(models, weights, *, normalize=True):
    """`sum(w_i x_i) / sum(w_i)` in float64."""
    total = sum(weights) if normalize else 1.0
    names = models[0].keys()
    return {name: sum(w * m[name].double() for w, m in zip(weights, models, strict=True)) / total for name in names}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.7, 0.1), (3.0, -1.0, 0.5), (1e-3, 2e-3, 0.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_result_is_the_weighted_sum_in_float64(weights, normalize):
    _, models = toy_models(exact=False)
    merged = merge_state_dicts("linear", models, weight=dict(zip("abc", weights, strict=True)), normalize=normalize)
    assert_near(merged, averaged(list(models.values()), weights, normalize=normalize), tolerance=1e-6)


def test_weights_one_and_zero_give_the_first_model():
    _, models = toy_models("ab", exact=False)
    assert_same_bytes(merge_state_dicts("linear", models, weight={"a": 1.0, "b": 0.0}), models["a"])


def test_weights_can_be_counts():
    _, models = toy_models("ab")
    by_share = merge_state_dicts("linear", models, weight={"a": 0.75, "b": 0.25})
    assert_same_bytes(merge_state_dicts("linear", models, weight={"a": 3.0, "b": 1.0}), by_share)


def test_a_model_and_its_mirror_image_average_to_the_middle():
    middle, delta = toy_base(), toy_deltas("a")
    assert_same_bytes(merge_state_dicts("linear", [plus(middle, delta), minus(middle, delta)]), middle)


def test_a_sum_that_is_not_normalised_is_a_sum():
    _, models = toy_models("a")
    doubled = merge_state_dicts("linear", [models["a"], models["a"]], normalize=False)
    assert_same_bytes(doubled, times(models["a"], 2.0))


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.1 + 0.2, -0.3), (0.0, 0.0)])
def test_weights_that_cancel_have_no_average(weights):
    _, models = toy_models("ab")
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts("linear", models, weight=dict(zip("ab", weights, strict=True)))


def test_weights_can_change_with_depth():
    models = {
        name: {f"layers.{i}.w": torch.full((2,), value) for i in range(3)}
        for name, value in zip("ab", (0.0, 8.0), strict=True)
    }
    merged = merge_state_dicts("linear", models, weight={"a": {"gradient": [1.0, 0.0]}, "b": {"gradient": [0.0, 1.0]}})
    assert [merged[f"layers.{i}.w"].tolist() for i in range(3)] == [[0.0, 0.0], [4.0, 4.0], [8.0, 8.0]]


def test_an_override_changes_the_weights_of_some_tensors():
    _, models = toy_models("ab")
    only_b = {"match": "lm_head.*", "weight": {"a": 0.0, "b": 1.0}}
    merged = merge_state_dicts({"method": "linear", "overrides": [only_b]}, models)
    assert merged["lm_head.weight"].equal(models["b"]["lm_head.weight"])
    assert not merged["logit_scale"].equal(models["b"]["logit_scale"])


def test_sixteen_bit_models_are_averaged_in_float32_and_rounded_once():
    models = [{"w": toy_models("a", seed, exact=False)[1]["a"]["lm_head.weight"].bfloat16()} for seed in range(8)]
    exact = averaged(models, [1.0] * 8)["w"].bfloat16()
    assert merge_state_dicts("linear", models)["w"].equal(exact)


def test_sources_in_several_dtypes_give_that_of_the_first():
    _, models = toy_models("ab")
    first = {name: value.half() for name, value in models["a"].items()}
    merged = merge_state_dicts("linear", {"a": first, "b": models["b"]}, weight={"a": 1.0, "b": 3.0})
    expected = averaged([first, models["b"]], (1.0, 3.0))
    assert_same_bytes(merged, {name: value.half() for name, value in expected.items()})
