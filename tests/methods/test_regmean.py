"""Regression of layers' outputs, against least squares in float64 and cases that are known exactly."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models, toy_statistics, uniform

NAME = "fc.weight"


def inputs(model, tokens=40, width=6, directions=6):
    """What goes into a layer: tokens that lie in so many directions."""
    drawn = uniform((tokens, directions), "inputs", model).double()
    return drawn @ uniform((directions, width), "directions", model).double()


def weight(model, outputs=4, width=6):
    return uniform((outputs, width), "weight", model)


def merge(given, *, models="ab", **settings):
    """The layers of some models, by their inputs."""
    states = {name: {NAME: weight(name)} for name in models}
    grams = {name: {NAME: (x.T @ x / len(x)).float()} for name, x in given.items()}
    return merge_state_dicts("regmean", states, statistics=grams, **settings)[NAME].double()


def by_formula(models, statistics, weights, alpha):
    """The formula as it is written, with an inverse, in float64."""
    left = right = 0
    for name, share in weights.items():
        gram = statistics[name].double()
        gram = alpha * gram + (1 - alpha) * gram.diagonal().diag()
        left, right = left + share * gram, right + share * gram @ models[name].double().T
    return (left.inverse() @ right).T


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.3, "b": 2.0, "c": 0.0}])
def test_the_result_is_the_formula_in_float64(alpha, weights):
    _, models = toy_models(exact=False)
    statistics = {name: toy_statistics("gram", name, model) for name, model in models.items()}
    found = merge_state_dicts("regmean", models, statistics=statistics, alpha=alpha, weight=weights, ridge=0.0)
    name = "model.layers.0.mlp.up_proj.weight"
    grams = {key: value[name] for key, value in statistics.items()}
    expected = by_formula({key: model[name] for key, model in models.items()}, grams, weights, alpha)
    assert_near({name: found[name]}, {name: expected}, tolerance=1e-5)


def test_it_solves_the_stacked_least_squares():
    """With as many directions as there are, the result is what one layer, fitted to all answers, comes to."""
    given = {name: inputs(name) for name in "ab"}
    answers = torch.cat([given[name] @ weight(name).double().T for name in "ab"])
    expected = torch.linalg.lstsq(torch.cat([given["a"], given["b"]]), answers).solution.T
    assert_near({NAME: merge(given, alpha=1.0, ridge=0.0)}, {NAME: expected}, tolerance=1e-4)


def test_models_that_see_different_directions_all_answer_as_before():
    """Exact recovery: each model's inputs lie in few directions of their own, so one layer can serve all."""
    given = {name: inputs(name, directions=3) for name in "ab"}
    found = merge(given, alpha=1.0, ridge=1e-9)
    for name in "ab":
        assert torch.allclose(given[name] @ found.T, given[name] @ weight(name).double().T, atol=1e-3)
    average = (weight("a") + weight("b")).double() / 2
    assert not torch.allclose(given["a"] @ average.T, given["a"] @ weight("a").double().T, atol=1e-1)


def test_equal_grams_are_the_average():
    assert_near({NAME: merge(dict.fromkeys("ab", inputs("a")))}, {NAME: (weight("a") + weight("b")) / 2})


def test_where_nothing_goes_in_the_average_is_taken():
    found = merge({"a": torch.zeros(4, 6), "b": torch.zeros(4, 6)})
    assert_near({NAME: found}, {NAME: (weight("a") + weight("b")) / 2}, tolerance=1e-6)


def test_directions_that_no_input_has_are_averaged():
    """Inputs along the first three axes say nothing about the others."""
    given = {name: inputs(name) * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) for name in "ab"}
    found, average = merge(given, alpha=1.0), (weight("a") + weight("b")).double() / 2
    assert torch.allclose(found[:, 3:], average[:, 3:], atol=1e-6)
    assert not torch.allclose(found[:, :3], average[:, :3], atol=1e-2)


def test_alpha_zero_weighs_every_input_by_its_mean_square():
    given = {name: inputs(name) for name in "ab"}
    sizes = {name: (given[name] ** 2).mean(0) for name in "ab"}
    expected = sum(sizes[name] * weight(name) for name in "ab") / sum(sizes.values())
    assert_near({NAME: merge(given, alpha=0.0, ridge=0.0)}, {NAME: expected}, tolerance=1e-5)


def test_what_is_no_linear_layer_is_averaged():
    _, models = toy_models("ab", exact=False)
    statistics = {name: {} | toy_statistics("gram", name, model) for name, model in models.items()}
    for each in statistics.values():
        del each["model.embed_tokens.weight"]
    found = merge_state_dicts("regmean", models, statistics=statistics)
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "logit_scale"):
        assert_near({name: found[name]}, {name: (models["a"][name] + models["b"][name]) / 2}, tolerance=1e-6)
