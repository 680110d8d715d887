"""The recipes that a search writes run from where they lie, and a search says what it was worth."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import mergetool
from mergetool.cli.app import app
from mergetool.search.interval import of_difference, of_weighted_difference
from mergetool.tensors.folder import open_model
from mergetool.testing.toys import assert_same_bytes, read
from mergetool.tuning.in_memory import saved_digest
from tests.tuning.planted import World
from tests.tuning.test_run import recipe

WORLD = World(count=40)
FEW = {"algorithm": "random", "population": 3, "generations": 1, "rerank": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    WORLD.write(folder)
    return folder


def told(command):
    """(stdout, stderr) of a command as one would type it."""
    done = CliRunner().invoke(app, shlex.split(command.removeprefix("mergetool ")))
    assert done.exception is None, done.exception
    return done.stdout.strip(), done.stderr


def relative(**search):
    """A recipe beside the models, with relative paths only."""
    return recipe(Path(), search=FEW | search) | {"output": {"path": "results/out"}}


@pytest.fixture
def project(folder, tmp_path):
    """A folder with models and tasks, whose results lie on another disk."""
    shutil.copytree(folder, tmp_path / "project")
    (tmp_path / "disk" / "very" / "deep").mkdir(parents=True)
    (tmp_path / "project" / "results").symlink_to(tmp_path / "disk" / "very" / "deep")
    return tmp_path / "project"


def test_a_winner_is_merged_again_by_its_file_alone(project, tmp_path, monkeypatch):
    (project / "recipe.yaml").write_text(yaml.safe_dump(relative()))
    monkeypatch.chdir(tmp_path)
    out, _ = told("mergetool run project/recipe.yaml")
    written = project / "results" / "out.search" / "recipe.yaml"
    assert not any(Path(path).is_absolute() for path in yaml.safe_load(written.read_text())["models"].values())
    again, _ = told("mergetool run project/results/out.search/recipe.yaml")
    assert again == str(written.parent / "winner")
    assert_same_bytes(read(Path(out)), read(Path(again)))
    monkeypatch.chdir(written.parent)
    assert Path(told("mergetool run recipe.yaml -o again")[0]).samefile(written.parent / "again")


def test_members_of_a_front_have_outputs_of_their_own(project):
    asked = relative(algorithm="nsga2", population=6, generations=4, rerank=4)
    (project / "recipe.yaml").write_text(yaml.safe_dump(asked))
    told(f"mergetool run {project}/recipe.yaml")
    search = project / "results" / "out.search"
    report = json.loads((search / "report.json").read_text())
    assert len(report["front"]) > 1
    for member in report["front"]:
        path, _ = told(f"mergetool run {search / member['recipe']}")
        assert saved_digest(open_model(Path(path))) == member["digest"]
    (search / "front" / "77.yaml").write_text("of a longer front")
    told(f"mergetool run {project}/recipe.yaml --overwrite")
    assert sorted(path.name for path in (search / "front").glob("*.yaml")) == [
        Path(member["recipe"]).name for member in report["front"]
    ]


def test_everything_that_lies_beside_a_recipe_is_found_from_another_folder(tmp_path):
    from mergetool.recipe import load_recipe
    from mergetool.tuning.written import moved

    head = {"weights": "heads/a.safetensors", "pool": "cls"}
    models = {"a": {"source": "a", "adapters": ["lora/a"], "head": head}, "b": "~/b", "c": "/abs/c", "d": "org/d"}
    data = {"base": "base", "models": models, "merge": {"method": "mass"}, "output": {"path": "out"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "a").mkdir()
    made = moved(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out.search")
    assert made["base"] == "../base"
    assert made["models"] == {
        "a": {"source": "../a", "adapters": ["../lora/a"], "head": {**head, "weights": "../heads/a.safetensors"}},
        "b": "~/b",
        "c": "/abs/c",
        "d": "org/d",
    }


def planted_scores(report_items, weights):
    """Report scores per task of a merge with these weights."""
    correct = WORLD.correct(weights)
    return [correct[np.array(report_items["lefts"])], correct[20 + np.array(report_items["rights"])]]


def test_a_winner_that_loses_is_called_that_everywhere_and_the_parent_can_be_had(folder, tmp_path):
    inner = {"method": "task-arithmetic", "weight": {"search": [0.4, 0.45]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, inner=inner, search=FEW)))
    _, said = told(f"mergetool run {tmp_path}/recipe.yaml -o {tmp_path}/out")
    search = tmp_path / "out.search"
    report = json.loads((search / "report.json").read_text())
    splits = json.loads((search / "search.jsonl").read_text().splitlines()[0])["pools"]["report"]
    ours = planted_scores(splits, report["winner"]["values"])
    parents = {"left": planted_scores(splits, (1, 0)), "right": planted_scores(splits, (0, 1))}
    means = {name: np.mean([part.mean() for part in scores]) for name, scores in parents.items()}
    best = max(means, key=means.get)
    parent = report["best_parent"]
    assert (parent["name"], parent["report_mean"]) == (best, pytest.approx(means[best]))
    assert parent["difference"] == pytest.approx(np.mean([part.mean() for part in ours]) - means[best])
    assert parent["difference_low"] < parent["difference"] < parent["difference_high"]
    (line,) = [line for line in said.splitlines() if line.startswith("note: the winner LOSES")]
    for text in (f"{means[best]:.4f}", f"{report['winner']['report_mean']:.4f}", "95 % interval"):
        assert text in line
    assert "warning: the winner LOSES" in said
    assert "The winner LOSES" in (search / "report.html").read_text()
    (warning,) = json.loads((tmp_path / "out" / "mergetool.json").read_text())["warnings"]
    assert warning.startswith(f"the winner LOSES to its parent {best!r}")
    assert str(tmp_path) not in warning
    instead, _ = told(line[line.index("mergetool run") :])
    assert_same_bytes(read(Path(instead)), read(folder / "models" / best))


def test_where_the_base_is_best_it_can_be_had_too(folder, tmp_path):
    asked = recipe(folder, search=FEW)
    asked["base"] = str(folder / "models" / "left")
    asked["models"] = {"worse": str(folder / "models" / "base")}
    asked["merge"]["inner"] = {"method": "task-arithmetic", "weight": {"search": [0.9, 1.0]}}
    result = mergetool.run(asked, output=tmp_path / "out")
    (warning,) = result.warnings
    assert warning.startswith("the winner LOSES to the base")
    instead, _ = told(warning[warning.index("mergetool run") :])
    assert_same_bytes(read(Path(instead)), read(folder / "models" / "left"))


def test_an_output_that_exists_says_that_answers_are_kept(folder, tmp_path, monkeypatch):
    asked = recipe(folder, search=FEW)
    mergetool.run(asked, output=tmp_path / "out")
    with pytest.raises(mergetool.OutputError) as caught:
        mergetool.run(asked, output=tmp_path / "out")
    assert "add --overwrite (answers that the search keeps are not asked again)" in caught.value.fix
    monkeypatch.setattr("mergetool.evaluate.items._answer", None)
    mergetool.run(asked, output=tmp_path / "out", overwrite=True)


def test_a_winner_that_wins_is_called_that(folder, tmp_path):
    inner = {"method": "task-arithmetic", "weight": {"search": [1.8, 2.0]}}
    result = mergetool.run(recipe(folder, inner=inner, search=FEW), output=tmp_path / "out")
    assert next(iter(result.notes)).startswith("the winner beats its parent")
    assert result.warnings == ()


def test_an_interval_of_one_task_is_that_of_its_difference_and_tasks_add_up():
    one, two = np.random.default_rng(0).random((2, 2, 50))
    assert of_weighted_difference([tuple(one)], [1.0]) == pytest.approx(of_difference(*one))
    low, high = of_weighted_difference([tuple(one), tuple(two)], [0.25, 0.75])
    halves = [(above - below) / 2 for below, above in (of_difference(*one), of_difference(*two))]
    assert (high - low) / 2 == pytest.approx(np.hypot(0.25 * halves[0], 0.75 * halves[1]))
