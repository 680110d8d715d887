"""Fisher-weighted averages, against the formula in float64 and cases that can be checked by hand."""

import pytest
import torch

from mergetool import PlanError, RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models, toy_statistics

ONE, TWO = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0, 7.0])


def merged(first, second, **settings):
    """Two vectors, with the Fisher information of each."""
    statistics = {"a": {"w": torch.tensor(first)}, "b": {"w": torch.tensor(second)}}
    return merge_state_dicts("fisher", {"a": {"w": ONE}, "b": {"w": TWO}}, statistics=statistics, **settings)["w"]


def by_formula(models, statistics, weights, floor=1e-6):
    """The formula in float64, tensor by tensor."""
    total, weighted = {}, {}
    for (name, model), weight in zip(models.items(), weights, strict=True):
        every = torch.cat([value.double().reshape(-1) for value in statistics[name].values()])
        for key, value in model.items():
            share = weight * (statistics[name][key].double() / every.square().mean().sqrt()).clamp(min=floor)
            total[key] = total.get(key, 0) + share
            weighted[key] = weighted.get(key, 0) + share * value.double()
    return {key: weighted[key] / total[key] for key in total}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.0)])
@pytest.mark.parametrize("floor", [1e-6, 1.5])
def test_the_result_is_the_formula_in_float64(weights, floor):
    _, models = toy_models(exact=False)
    statistics = {name: toy_statistics("fisher", name, model) for name, model in models.items()}
    given = dict(zip("abc", weights, strict=True))
    found = merge_state_dicts("fisher", models, statistics=statistics, weight=given, floor=floor)
    assert_near(found, by_formula(models, statistics, weights, floor), tolerance=1e-6)


def test_equal_information_is_the_average():
    assert merged([2.0, 2.0, 2.0], [2.0, 2.0, 2.0]).tolist() == [3.0, 4.0, 5.0]


def test_models_of_another_scale_count_alike():
    """Only where a model's information lies counts, not how much there is."""
    assert torch.allclose(merged([1.0, 2.0, 3.0], [300.0, 200.0, 100.0]), merged([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]))


def test_what_only_one_model_needs_is_that_models():
    assert torch.allclose(merged([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]), torch.tensor([1.0, 6.0, 3.0]), atol=1e-5)


@pytest.mark.parametrize("floor", [1e-6, 0.0])
def test_what_no_model_needs_is_averaged(floor):
    assert merged([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], floor=floor).tolist() == [3.0, 4.0, 5.0]
    assert merged([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], floor=floor).tolist() == [3.0, 4.0, 5.0]


def test_what_was_not_measured_on_every_model_is_averaged():
    models = {"a": {"w": ONE, "v": ONE}, "b": {"w": TWO, "v": TWO}}
    first = {"w": torch.tensor([1.0, 0.0, 0.0]), "v": torch.tensor([9.0, 9.0, 1.0])}
    found = merge_state_dicts("fisher", models, statistics={"a": first, "b": {"w": torch.ones(3)}})
    assert found["v"].tolist() == [3.0, 4.0, 5.0]
    assert found["w"].tolist() != [3.0, 4.0, 5.0]


def test_an_override_can_copy_a_tensor():
    section = {"method": "fisher", "overrides": [{"match": "w", "use": "b"}]}
    statistics = {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3)}}
    found = merge_state_dicts(section, {"a": {"w": ONE}, "b": {"w": TWO}}, statistics=statistics)
    assert found["w"].equal(TWO)


def test_without_statistics_it_says_how_to_give_them():
    with pytest.raises(RecipeError, match="measures the models on data") as error:
        merge_state_dicts("fisher", {"a": {"w": ONE}, "b": {"w": TWO}})
    assert "`statistics`" in error.value.fix


def test_weights_that_are_all_zero_have_no_average():
    with pytest.raises(PlanError, match="all weights are 0"):
        merged([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], weight=0.0)


def test_a_statistic_of_every_model_is_needed():
    with pytest.raises(RecipeError, match="nothing for model 'b'"):
        merge_state_dicts("fisher", {"a": {"w": ONE}, "b": {"w": TWO}}, statistics={"a": {"w": ONE}})


def test_a_method_that_needs_data_cannot_be_inside_another_one():
    models = {name: toy_models("a")[1]["a"] for name in "ab"}
    with pytest.raises(RecipeError, match="only the method of the whole recipe"):
        merge_state_dicts("git-rebasin", models, combine={"method": "fisher"})
