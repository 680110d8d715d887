"""Task arithmetic, against sums in float64 and the identities that the paper's operations promise."""

import pytest

from mergetool import PlanError, RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, minus, plus, times, toy_base, toy_deltas, toy_models

NAME = "task-arithmetic"


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.7, 0.1), (1.0, -0.5, 0.25)])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_result_is_the_base_plus_the_weighted_sum_in_float64(weights, normalize):
    base, models = toy_models(exact=False)
    by_name = dict(zip("abc", weights, strict=True))
    merged = merge_state_dicts(NAME, models, base, weight=by_name, scale=0.4, normalize=normalize)
    factor = 0.4 / sum(weights) if normalize else 0.4
    expected = {
        name: value.double() + factor * sum(w * (models[m][name].double() - value.double()) for m, w in by_name.items())
        for name, value in base.items()
    }
    assert_near(merged, expected, tolerance=1e-6)


def test_one_model_at_scale_one_is_that_model():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts(NAME, models, base), models["a"])


def test_copies_of_one_model_add_up():
    base, delta = toy_base(), toy_deltas("a")
    tuned = plus(base, delta)
    assert_same_bytes(merge_state_dicts(NAME, [tuned] * 3, base), plus(base, delta, 3.0))


def test_what_was_added_can_be_taken_away_again():
    base, models = toy_models("ab")
    added = merge_state_dicts(NAME, models, base)
    without_a = merge_state_dicts(NAME, {"a": models["a"]}, base, scale=-1.0)
    back = merge_state_dicts(NAME, {"added": added, "without_a": without_a}, base)
    assert_same_bytes(back, models["b"])


def test_a_task_by_analogy_is_c_plus_b_minus_a():
    base, models = toy_models("abc")
    merged = merge_state_dicts(NAME, models, base, weight={"a": -1.0, "b": 1.0, "c": 1.0})
    expected = plus(base, minus(plus(toy_deltas("c"), toy_deltas("b")), toy_deltas("a")))
    assert_same_bytes(merged, expected)
    same = {"a": models["a"], "b": models["a"], "c": models["c"]}
    assert_same_bytes(merge_state_dicts(NAME, same, base, weight={"a": -1.0, "b": 1.0, "c": 1.0}), models["c"])


def test_the_change_is_proportional_to_the_scale():
    base, models = toy_models()
    change = minus(merge_state_dicts(NAME, models, base), base)
    for scale in (0.5, 2.0, -1.0):
        assert_same_bytes(merge_state_dicts(NAME, models, base, scale=scale), plus(base, times(change, scale)))


def test_scale_can_change_with_depth():
    base, models = toy_models("a")
    merged = merge_state_dicts(NAME, models, base, scale={"gradient": [0.0, 1.0]})
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert merged[first].equal(base[first])
    assert merged[last].equal(models["a"][last])


def test_sixteen_bit_models_are_subtracted_in_float32_and_rounded_once():
    base, models = toy_models(exact=False)
    halves = [{name: value.bfloat16() for name, value in state.items()} for state in (base, *models.values())]
    merged = merge_state_dicts(NAME, halves[1:], halves[0], scale=0.25)
    expected = {
        name: (value.double() + 0.25 * sum(m[name].double() - value.double() for m in halves[1:])).bfloat16()
        for name, value in halves[0].items()
    }
    assert_same_bytes(merged, expected)


def test_weights_that_cancel_cannot_be_normalised():
    base, models = toy_models("ab")
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts(NAME, models, base, weight={"a": 1.0, "b": -1.0}, normalize=True)


def test_a_base_is_needed():
    with pytest.raises(RecipeError, match="common ancestor"):
        merge_state_dicts(NAME, toy_models()[1])
