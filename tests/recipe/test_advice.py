"""Advice is followed: what a message tells to write is written, and then it works."""

import json
import re

import pytest
import torch
import yaml

import mergetool
from mergetool.bundle.rows import inputs_of
from mergetool.errors import HubError, RecipeError, SourceError
from mergetool.recipe import load_recipe
from tests.cli.conftest import call  # noqa: F401  (a fixture)
from tests.files import tensors, write_model

BASE = {"base": "base", "models": {"a": "a", "b": "b"}}


def refused(recipe):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (problem,) = caught.value.problems
    return problem


def recipe(**merge):
    return BASE | {"merge": {"method": "ties", **merge}}


@pytest.mark.parametrize("field", ["weight", "density", "scale"])
def test_a_list_of_numbers_may_be_a_gradient_or_a_value_for_each_model(field):
    fix = refused(recipe(**{field: [0.5, 0.6]})).fix
    offers = re.findall(r"\{[^{}]*\}", fix)
    assert offers[0] == "{gradient: [0.5, 0.6]}"
    assert offers[1:] == ([] if field == "scale" else ["{a: 0.5, b: 0.6}"])
    for offer in offers:
        load_recipe(recipe(**{field: yaml.safe_load(offer)}))


def test_a_list_in_an_override_or_in_a_method_inside_is_told_the_same():
    fix = refused(recipe(overrides=[{"match": "x", "weight": [0.1, 0.2]}])).fix
    assert fix == "write {gradient: [0.1, 0.2]} for values along depth, or {a: 0.1, b: 0.2} for one value a model"
    for offer in re.findall(r"\{[^{}]*\}", fix):
        load_recipe(recipe(overrides=[{"match": "x", "weight": yaml.safe_load(offer)}]))
    models, inside = {"a": "a", "b": "b"}, {"method": "linear", "weight": [0.1, 0.2]}
    assert refused({"models": models, "merge": {"method": "c2m3", "combine": inside}}).fix == fix
    assert refused(recipe(method="merge3", tasks=[{"name": "x"}], inner=SEARCHED | {"weight": [0.1, 0.2]})).fix == fix


SEARCHED = {"method": "ties", "density": {"search": [0.1, 0.9]}}


def test_a_method_inside_another_is_looked_up_as_kindly():
    asked = {"models": {"a": "a", "b": "b"}, "merge": {"method": "c2m3", "combine": {"method": "SLERP"}}}
    problem = refused(asked)
    assert (problem.what, problem.fix) == ("there is no method 'SLERP'", "did you mean 'slerp'?")
    asked["merge"]["combine"]["method"] = "slerp"
    load_recipe(asked)
    problem = refused(recipe(method="merge3", tasks=[{"name": "x"}], inner=SEARCHED | {"method": "task_arithmetic"}))
    assert problem.fix == "did you mean 'task-arithmetic'?"


def test_a_list_that_fits_no_models_or_one_model_may_only_be_a_gradient():
    for settings in ({"weight": [0.1, 0.2, 0.3]}, {"weight": {"a": [0.1, 0.2], "b": 1.0}}):
        fix = refused(recipe(**settings)).fix
        assert fix.startswith("write {gradient: [0.1, 0.2")
        assert "one value a model" not in fix


@pytest.mark.parametrize(
    ("written", "meant"),
    [("TIES", "ties"), ("DARE_TIES", "dare-ties"), ("task_arithmetic", "task-arithmetic"), ("Task Arithmetic", None)],
)
def test_capitals_and_underscores_are_no_other_method(written, meant):
    meant = meant or "task-arithmetic"
    assert refused(BASE | {"merge": {"method": written}}).fix == f"did you mean {meant!r}?"
    load_recipe(BASE | {"merge": {"method": meant}})


@pytest.mark.parametrize(
    ("section", "written", "meant"),
    [
        ("output", "bf16", "bfloat16"),
        ("output", "fp16", "float16"),
        ("output", "torch.bfloat16", "bfloat16"),
        ("output", "half", "float16"),
        ("compute", "fp32", "float32"),
        ("compute", "double", "float64"),
        ("compute", "bf16", "float32"),
    ],
)
def test_dtypes_by_other_names_are_told_by_ours(section, written, meant):
    assert refused(recipe() | {section: {"dtype": written}}).fix == f"write {meant}"
    load_recipe(recipe() | {section: {"dtype": meant}})


@pytest.mark.parametrize(("key", "value", "section"), [("dtype", "bfloat16", "output"), ("seed", 3, "compute")])
def test_a_key_at_the_top_that_belongs_into_a_section_is_told_where(key, value, section):
    problem = refused(recipe() | {key: value})
    assert problem.fix == f"write it inside `{section}`: {section}: {{{key}: ...}}"
    load_recipe(recipe() | {section: {key: value}})


class Model:
    """Of a bundle, as much as rows need."""

    def read(self, texts):
        return {"input_ids": torch.ones(len(texts), 2)}


@pytest.mark.parametrize("rows", [[{"prompt": "b", "id": 1}], [{"text": "a"}, {"prompt": "b"}]])
def test_a_row_without_its_field_is_told_the_field(rows):
    with pytest.raises(SourceError, match=r"field `prompt` is|has no field `text`") as caught:
        inputs_of(Model(), rows)
    offer = json.loads(caught.value.fix.removeprefix("call the field `text`: "))
    assert inputs_of(Model(), [offer])["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("command", ["evaluate {} --tasks x --include .", "push {} a/b", "route {} --input rows.jsonl"])
def test_a_missing_folder_is_told_before_anything_else(call, tmp_path, monkeypatch, command):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    code, _, err = call(*command.format("./nowhere").split())
    assert code == 3
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in err
    write_model(tmp_path / "nowhere", tensors(0))
    assert "there is no such folder" not in call(*command.format("./nowhere").split())[2]


def test_a_folder_that_is_missing_is_told_before_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise HubError("the Hub cannot be reached (ConnectError)", "models/a", "check the network")

    monkeypatch.setattr("mergetool.planning.sources.find", unreachable)
    monkeypatch.chdir(tmp_path)
    asked = {"models": {"a": "models/a", "b": "models/a"}, "merge": {"method": "linear"}}
    with pytest.raises(HubError) as caught:
        mergetool.plan(asked)
    place = tmp_path / "models" / "a"
    assert caught.value.what.startswith(f"there is no folder {place}; and as a model on the Hub: the Hub cannot")
    assert f"a folder of this name would have to be {place}" in caught.value.fix
    place.parent.mkdir()
    write_model(place, tensors(0))
    mergetool.plan(asked)
