"""Every architecture of the zoo merged in a run, against a float64 merge of the modules that transformers loads."""

import pytest

import mergetool
from tests.checkpoints.recipes import recipe_of
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import linear, task_arithmetic


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sum_of_task_vectors_answers_as_that_of_the_loaded_modules(zoo, name, tmp_path):
    family, base = FAMILIES[name], zoo.base(name)
    models = [zoo.tuned(name, seed) for seed in (1, 2)]
    out = mergetool.run(recipe_of(base, *models), output=tmp_path / "out").path
    states = [zoo.state(folder, family.model) for folder in (base, *models)]
    assert_merged(out, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs())


@pytest.mark.parametrize("name", FAMILIES)
def test_an_average_answers_as_that_of_the_loaded_modules(zoo, name, tmp_path):
    family = FAMILIES[name]
    models = [zoo.tuned(name, seed) for seed in (1, 2)]
    out = mergetool.run(recipe_of(None, *models, method="linear"), output=tmp_path / "out").path
    states = [zoo.state(folder, family.model) for folder in models]
    assert_merged(out, family.auto, None, states, linear, family.inputs())
