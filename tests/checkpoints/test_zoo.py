"""Every architecture of the zoo merged in a run, against a float64 merge of the modules that transformers loads."""

import pytest
import torch
from safetensors.torch import save_file

import mergetool
from tests.checkpoints.recipes import recipe_of
from tests.files import LONG
from tests.zoo import files
from tests.zoo.build import change_config
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import linear, opened, task_arithmetic


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sum_of_task_vectors_answers_as_that_of_the_loaded_modules(zoo, name, tmp_path):
    family, base = FAMILIES[name], zoo.base(name)
    models = [zoo.tuned(name, seed) for seed in (1, 2)]
    out = mergetool.run(recipe_of(base, *models), output=tmp_path / "out").path
    states = [zoo.state(folder, family.model) for folder in (base, *models)]
    assert_merged(out, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs())


@pytest.mark.parametrize(
    "name", FAMILIES if LONG else ["qwen2-tied", "qwen3-moe", "gemma3", "bert", "t5", "bart", "clip"]
)
def test_an_average_answers_as_that_of_the_loaded_modules(zoo, name, tmp_path):
    family = FAMILIES[name]
    models = [zoo.tuned(name, seed) for seed in (1, 2)]
    out = mergetool.run(recipe_of(None, *models, method="linear"), output=tmp_path / "out").path
    states = [zoo.state(folder, family.model) for folder in models]
    assert_merged(out, family.auto, None, states, linear, family.inputs())


def right_result(zoo, folder):
    """A merge whose head has become one of its own, saved by transformers."""
    base, tied, other = zoo.base("qwen2-tied"), zoo.tuned("qwen2-tied", 1), zoo.tuned("qwen2-tied", 2)
    names = "model.embed_tokens.weight", "lm_head.weight"
    untied = zoo.made("right-untied", lambda made: files.with_own_head(made, other, *names))
    states = [zoo.state(source, FAMILIES["qwen2-tied"].model) for source in (base, tied, untied)]
    module, _ = opened(untied, FAMILIES["qwen2-tied"].model)
    module.load_state_dict(task_arithmetic(0.5)(states[0], states[1:]))
    module.config.tie_word_embeddings = False
    module.float().save_pretrained(folder)
    return states


def untrue(folder):
    change_config(folder, tie_word_embeddings=True)


def without_a_tensor(folder):
    state = files.weights(folder)
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_a_stranger(folder):
    save_file(files.weights(folder) | {"w": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})


def with_another_value(folder):
    state = files.weights(folder)
    state["model.layers.1.input_layernorm.weight"][3] += 1e-3
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_a_stale_head(folder):
    state = files.weights(folder)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


FAULTS = [untrue, without_a_tensor, with_a_stranger, with_another_value, with_a_stale_head]


@pytest.mark.parametrize("damage", [None, *FAULTS])
def test_the_check_takes_what_is_right_and_sees_each_fault(zoo, damage, tmp_path):
    states = right_result(zoo, tmp_path)
    family = FAMILIES["qwen2-tied"]
    arguments = tmp_path, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs()
    if damage is None:
        assert_merged(*arguments)
        return
    damage(tmp_path)
    with pytest.raises(AssertionError):
        assert_merged(*arguments)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_fine_tune_is_its_own(zoo, name):
    """What is equal in all models would hide a tensor that is copied instead of merged."""
    base, a = (files.weights(folder) for folder in (zoo.base(name), zoo.tuned(name, 1)))
    assert base.keys() == a.keys()
    assert [key for key, value in base.items() if value.is_floating_point() and torch.equal(value, a[key])] == []
