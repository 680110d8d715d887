"""Consensus: which entries matter to how many models, against masks in float64, and by hand."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform


def naive(deltas, thresholds, agreeing):
    total = sum(deltas)
    masks = [delta.abs() > t * (total - delta).abs() for delta, t in zip(deltas, thresholds, strict=True)]
    return torch.where(sum(mask.int() for mask in masks) >= agreeing, total, 0.0)


def merged(*deltas, **settings):
    models = {f"m{i}": {"w": torch.tensor(delta)} for i, delta in enumerate(deltas)}
    return merge_state_dicts("consensus", models, {"w": torch.zeros(len(deltas[0]))}, **settings)["w"]


@pytest.mark.parametrize("agreeing", [0, 1, 2, 3, 4])
def test_the_sum_stays_where_it_matters_to_enough_models(agreeing):
    base, models = toy_models("abc", exact=False)
    weights, thresholds = {"a": 0.7, "b": 1.5, "c": 0.4}, {"a": 0.2, "b": 0.5, "c": 0.9}
    found = merge_state_dicts(
        "consensus", models, base, weight=weights, threshold=thresholds, agreeing=agreeing, scale=0.6
    )
    expected = {}
    for name, value in base.items():
        deltas = [w * (models[m][name].double() - value.double()) for m, w in weights.items()]
        expected[name] = value.double() + 0.6 * naive(deltas, thresholds.values(), agreeing)
    assert_near(found, expected, tolerance=1e-6)


def test_what_matters_to_none_and_what_matters_to_one_alone_is_dropped():
    deltas = [1.0, 4.0, 4.0], [1.0, 4.0, -0.25], [1.0, 0.25, 0.25]  # matters to none, to two, to one
    assert merged(*deltas, threshold=0.6).tolist() == [0.0, 8.25, 0.0]
    assert merged(*deltas, threshold=0.6, agreeing=1).tolist() == [0.0, 8.25, 4.0]
    assert merged(*deltas, threshold=0.6, agreeing=0).tolist() == [3.0, 8.25, 4.0]


def test_asking_no_model_is_task_arithmetic_and_asking_more_than_there_are_is_the_base():
    base, models = toy_models("abc")
    settings = {"weight": {"a": 1.0, "b": 0.5, "c": 0.25}, "scale": 0.5}
    summed = merge_state_dicts("task-arithmetic", models, base, **settings)
    assert_near(merge_state_dicts("consensus", models, base, agreeing=0, **settings), summed)
    assert_same_bytes(merge_state_dicts("consensus", models, base, agreeing=4, **settings), base)


@pytest.mark.parametrize(("threshold", "kept"), [(0.49, True), (0.51, False)])
def test_copies_agree_up_to_one_over_their_number_less_one(threshold, kept):
    delta = uniform((50,), "delta")
    found = merged(*[delta.tolist()] * 3, threshold=threshold)
    torch.testing.assert_close(found, 3 * delta if kept else torch.zeros(50))


def test_one_model_alone_is_that_model_where_one_is_enough():
    base, models = toy_models("a")
    assert_near(merge_state_dicts("consensus", models, base, agreeing=1), models["a"])


def test_more_models_than_there_are_agree_on_nothing():
    base = {"w": torch.zeros(2)}
    models = {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}
    assert merge_state_dicts("consensus", models, base, agreeing=2**70)["w"].tolist() == [0.0, 0.0]
