"""Trimming by importance, against the formula in float64, and beside TIES."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models, toy_statistics


def by_formula(base, models, statistics, density, power, floor=1e-6):
    """In float64, one tensor after the other."""
    sizes = {
        name: torch.cat([value.double().reshape(-1) for value in each.values()]).square().mean().sqrt()
        for name, each in statistics.items()
    }
    found = {}
    for key, value in base.items():
        kept = []
        for name, model in models.items():
            delta = model[key].double() - value.double()
            score = delta.abs() * (statistics[name][key].double() / sizes[name]).clamp(min=floor) ** power
            count = max(1, int(density * delta.numel()))
            kept.append(delta * (score >= score.reshape(-1).sort().values[-count]))
        sign = sum(kept).sign()
        agree = [delta * (delta.sign() == sign) for delta in kept]
        found[key] = value.double() + sum(agree) / sum((each != 0).double() for each in agree).clamp(min=1)
    return found


@pytest.mark.parametrize(("density", "power"), [(0.3, 0.5), (0.3, 1.0), (0.6, 0.5), (1.0, 0.5)])
def test_the_result_is_the_formula_in_float64(density, power):
    base, models = toy_models("abc", exact=False)
    statistics = {name: toy_statistics("fisher", name, model) for name, model in models.items()}
    base = {key: value for key, value in base.items() if value.numel()}
    models = {name: {key: model[key] for key in base} for name, model in models.items()}
    statistics = {name: {key: each[key] for key in base} for name, each in statistics.items()}
    found = merge_state_dicts("importance", models, base, statistics=statistics, density=density, power=power)
    assert_near(found, by_formula(base, models, statistics, density, power), tolerance=1e-5)


def test_a_small_change_that_matters_is_kept_and_a_large_one_that_does_not_is_left_out():
    base, model = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 1.0])}
    for important, kept in (([1.0, 100.0], [0.0, 1.0]), ([1.0, 1.0], [3.0, 0.0])):
        statistics = {"a": {"w": torch.tensor(important)}}
        found = merge_state_dicts("importance", {"a": model}, base, statistics=statistics, density=0.5)
        assert found["w"].tolist() == kept


def test_where_data_say_nothing_the_largest_are_kept():
    base, model = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 2.0, -3.0])}
    found = merge_state_dicts("importance", {"a": model}, base, statistics={"a": {"w": torch.zeros(3)}}, density=0.34)
    assert found["w"].tolist() == [0.0, 0.0, -3.0]
    unmeasured = merge_state_dicts("importance", {"a": model}, base, statistics={"a": {}}, density=0.34)
    assert unmeasured["w"].tolist() == [0.0, 0.0, -3.0]


def test_without_information_it_is_ties():
    base, models = toy_models("ab", exact=False)
    statistics = {name: toy_statistics("fisher", name, model) for name, model in models.items()}
    found = merge_state_dicts("importance", models, base, statistics=statistics, power=0.0, density=0.3)
    assert_near(found, merge_state_dicts("ties", models, base, density=0.3), tolerance=1e-6)
