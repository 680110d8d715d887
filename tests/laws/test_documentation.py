"""Every method explains itself, and comes with a recipe that runs."""

from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import mergetool
from mergetool.bundle.manifest import read_manifest
from mergetool.cli.app import app
from mergetool.methods import registry
from mergetool.methods.families.bundle import BundleMethod
from mergetool.methods.families.search import SearchMethod
from mergetool.recipe.adapters import has_adapters
from mergetool.recipe.documentation import method_facts
from mergetool.testing.toys import INTEGERS, MLP, SHAPES, read, toy_models, write
from tests.dense import write_dense
from tests.tuning.planted import World

METHODS = sorted(registry())
RECIPES = Path(__file__).parents[2] / "recipes"
RESHAPING = [name for name, kind in registry().items() if kind.searches and kind.reshapes]
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_the_documentation_says_what_it_does_where_it_is_from_and_where_it_differs(name):
    first, blank, *rest = registry()[name].documentation().splitlines()
    assert first.endswith(".")
    assert blank == ""
    assert any(line.startswith("Reference: ") for line in rest)
    assert any(line.startswith("Differs from the paper: ") for line in rest)


@every_method
def test_every_field_is_described(name):
    (facts,) = method_facts(name)
    for field in facts["fields"]:
        assert len(field["help"]) > 10, field["name"]
        assert field["type"], field["name"]


@every_method
def test_the_command_line_prints_the_documentation_and_all_fields(name):
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 0
    assert registry()[name].documentation() in shown.stdout
    for field in method_facts(name)[0]["fields"]:
        assert field["name"] in shown.stdout
        assert field["help"] in shown.stdout


def test_the_command_line_lists_every_method():
    shown = CliRunner().invoke(app, ["methods"])
    assert [line.split()[0] for line in shown.stdout.splitlines()[1:]] == METHODS


@every_method
def test_its_recipe_opens_with_the_command_that_runs_it_and_with_what_it_is_for(name):
    opening = (RECIPES / f"{name}.yaml").read_text().splitlines()[:3]
    assert opening[0] == f"# mergetool run recipes/{name}.yaml"
    assert opening[1] == "#"
    assert len(opening[2]) > 40


@every_method
def test_its_recipe_runs_from_end_to_end(name, tmp_path):
    document = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert document["merge"]["method"] == name
    assert document["output"]["path"] == f"./out/{name}"
    shapes = MLP if "architecture" in document else SHAPES
    if registry()[name].arranges:
        names = ("base", *document["models"])
        paths = {key: str(write_dense(tmp_path / "models" / key, seed=seed)) for seed, key in enumerate(names)}
    elif "calibration" in document:
        names = ("base", *document["models"])
        paths = {key: str(write_dense(tmp_path / "models" / key, seed=seed)) for seed, key in enumerate(names)}
        document["merge"] |= {"steps": 2} if "steps" in document["merge"] else {}
        (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4 w5"}\n')
        calibration = document["calibration"]
        for data in [calibration] if "data" in calibration else calibration.values():
            data |= {"data": "./rows.jsonl", "length": 64}
    elif has_adapters(document):
        paths = {key: write_adapter(tmp_path, key) for key in document["models"]}
    elif issubclass(registry()[name], SearchMethod):
        document["merge"]["search"] |= {"population": 4, "generations": 1}
        tasks = [task["name"] for task in document["merge"]["tasks"]]
        paths = World().write(tmp_path, tuple(document["models"]), tasks)
    elif "glob" in document["models"]:
        paths = write(tmp_path / "runs", {f"checkpoint-{key}": state for key, state in toy_models("12")[1].items()})
    else:
        base, models = toy_models(document["models"], exact=False, shapes=shapes)
        states = {key: state | INTEGERS for key, state in {"base": base, **models}.items()}
        paths = {key: str(path) for key, path in write(tmp_path / "models", states).items()}
    if "glob" not in document["models"]:
        document["models"] = {key: paths[key] for key in document["models"]}
    if "base" in document:
        document["base"] = paths["base"]
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    result = mergetool.run(recipe)
    assert result.path == tmp_path / "out" / name
    assert result.warnings == ()
    if issubclass(registry()[name], BundleMethod):
        assert read_manifest(result.path).names == tuple(document["models"])
    elif name not in RESHAPING and not registry()[name].arranges and not has_adapters(document):
        made = result.results[0] if "sweep" in document else result.path
        assert read(made).keys() == read(Path(next(iter(paths.values())))).keys()


def write_adapter(folder, name):
    """An adapter, by PEFT, of a network of two layers; where it lies, as a recipe names it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"])
    )
    torch.nn.init.normal_(model.base_model.model[0].lora_B.default.weight)
    model.save_pretrained(folder / name)
    return {"adapter": str(folder / name)}


def test_every_recipe_here_is_valid(tmp_path):
    paths = sorted(RECIPES.rglob("*.yaml"))
    assert {path.stem for path in paths} >= set(METHODS)
    (tmp_path / "runs" / "checkpoint-1").mkdir(parents=True)  # that globs find something
    for path in paths:
        mergetool.load_recipe(yaml.safe_load(path.read_text()), folder=tmp_path)
