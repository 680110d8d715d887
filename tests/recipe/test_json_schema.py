"""The schema that editors complete by: it knows every recipe here, refuses what a run refuses, and explains itself."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import TensorMethod
from mergetool.recipe import load_recipe
from mergetool.recipe.json_schema import recipe_schema
from mergetool.recipe.starter import starter

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_here_is_valid(validator, path):
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("name", registry())
def test_every_recipe_to_begin_with_is_valid(validator, name):
    validator.validate(yaml.safe_load(starter(name)))


def recipe(**changes):
    sections = {"base": "./base", "models": {"a": "./a", "b": "./b"}, "merge": {"method": "ties"}}
    return {**sections, **changes}


def search(inner, **more):
    return recipe(merge={"method": "merge3", "inner": inner, "tasks": [{"name": "arc_easy"}], **more})


RIGHT = {
    "a model with adapters": recipe(models={"a": {"source": "./a", "adapters": ["./lora"]}}),
    "a head": recipe(
        models={"a": {"source": "./a", "head": {"weights": "h.safetensors", "pool": "mean"}}}, merge={"method": "mass"}
    ),
    "a recipe inside": recipe(
        models={"a": {"recipe": {"models": {"x": "./x"}, "merge": {"method": "linear"}}, "adapters": ["./lora"]}}
    ),
    "an override": recipe(merge={"method": "ties", "overrides": [{"match": "*", "density": 0.4}]}),
    "a range": search({"method": "ties", "density": {"search": [0.1, 0.9], "step": 0.1}}),
    "a choice": search({"method": "ties", "boundary": {"choices": ["keep", "drop"]}}),
    "a range for one model": search({"method": "ties", "weight": {"a": {"search": [0, 1]}, "b": 0.5}}),
    "ranges along depth": search({"method": "ties", "scale": {"gradient": [0.3, {"search": [0, 1]}]}}),
    "a range in an override": search(
        {"method": "ties", "overrides": [{"match": "*.mlp.*", "scale": {"search": [0, 1], "groups": 3}}]}
    ),
    "an inner method of a fit": {
        "models": {"a": "./a", "b": "./b"},
        "merge": {"method": "c2m3", "combine": {"method": "slerp", "t": 0.3}},
    },
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_may_be_written_is_valid(validator, case):
    validator.validate(RIGHT[case])
    load_recipe(RIGHT[case])


WRONG = {
    "a field of a model": recipe(models={"a": {"source": "./a", "adaptors": ["./lora"]}}),
    "a model without a source": recipe(models={"a": {"adapters": ["./lora"]}}),
    "a field of a recipe inside": recipe(
        models={"a": {"recipe": {"models": {"x": "./x"}, "merge": {"method": "linear", "wieght": 1}}}}
    ),
    "a field of a head": recipe(models={"a": {"source": "./a", "head": {"weights": "h", "pol": "mean"}}}),
    "a field of the base": recipe(base={"source": "./base", "revision": "main"}),
    "a field of an override": recipe(merge={"method": "ties", "overrides": [{"match": "*", "densty": 0.4}]}),
    "a field of another method in an override": recipe(
        merge={"method": "ties", "overrides": [{"match": "*", "t": 0.4}]}
    ),
    "an override of nothing": recipe(merge={"method": "ties", "overrides": [{"density": 0.4}]}),
    "a field of the inner method": search({"method": "ties", "densty": {"search": [0.1, 0.9]}}),
    "a method inside that is none": search({"method": "tiess", "density": {"search": [0.1, 0.9]}}),
    "a search inside a search": search({"method": "merge3", "density": {"search": [0.1, 0.9]}}),
    "a field of a range": search({"method": "ties", "density": {"search": [0.1, 0.9], "setp": 0.1}}),
    "a range of one number": search({"method": "ties", "density": {"search": [0.1]}}),
    "a range and choices": search({"method": "ties", "density": {"search": [0.1, 0.9], "choices": [1]}}),
    "a range for a model": search({"method": "ties", "weight": {"a": {"serch": [0, 1]}, "b": {"search": [0, 1]}}}),
    "a field of an override of the inner method": search(
        {"method": "ties", "overrides": [{"match": "*", "densty": {"search": [0, 1]}}]}
    ),
    "overrides of a search": search({"method": "ties", "density": {"search": [0.1, 0.9]}}, overrides=[]),
    "a search without tasks": recipe(
        merge={"method": "merge3", "inner": {"method": "ties", "density": {"search": [0.1, 0.9]}}}
    ),
    "a field of the method of a fit": {
        "models": {"a": "./a", "b": "./b"},
        "merge": {"method": "c2m3", "combine": {"method": "slerp", "s": 0.3}},
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_run_refuses_is_refused(validator, case):
    assert not validator.is_valid(WRONG[case])
    with pytest.raises(RecipeError):
        load_recipe(WRONG[case])


def test_methods_and_their_fields_are_described_wherever_they_may_stand(validator):
    schema = validator.schema
    inner = [kind for kind in registry().values() if issubclass(kind, TensorMethod)]
    places = {
        "": schema["properties"]["merge"],
        "s": schema["$defs"]["SearchedMethod"],
        "c": schema["$defs"]["TensorMethod"],
    }
    for place, kinds in (("", registry().values()), ("s", inner), ("c", inner)):
        told = {each["properties"]["method"]["const"]: each for each in places[place]["oneOf"]}
        assert told.keys() == {kind.method_name() for kind in kinds}
        for kind in kinds:
            method = told[kind.method_name()]
            assert method["description"].startswith(kind.documentation().splitlines()[0])
            assert len(method["description"]) > 150
            for key, info in kind.model_fields.items():
                assert key == "method" or method["properties"][key]["description"] == info.description
