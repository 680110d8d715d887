"""A search over models that other recipes make: these are made first, and the winner is merged of them."""

import json

import pytest
import yaml

import mergetool
from mergetool.testing.toys import assert_same_bytes, read
from mergetool.tuning import run as tuning_run
from tests.tuning.planted import World
from tests.tuning.test_run import recipe

FEW = {"population": 3, "generations": 1, "rerank": 1}
SHORT = {"inner": {"method": "task-arithmetic", "weight": {"search": [0.0, 2.0]}}, "search": FEW}


@pytest.fixture
def folder(tmp_path):
    """Planted models, and a recipe of two of them beside them."""
    World(count=40).write(tmp_path)
    left, right = World.names
    mix = {"base": "models/base", "models": {name: f"models/{name}" for name in (left, right)}}
    mix["merge"] = {"method": "task-arithmetic", "weight": {left: 0.8, right: 0.3}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    return tmp_path


def asked(folder, source, **changes):
    """A search over a model that lies at `source` and the right one."""
    models = {"mixed": source, "right": str(folder / "models" / "right")}
    return {**recipe(folder, **SHORT), "models": models, **changes}


def test_a_search_over_what_a_recipe_makes_is_the_search_over_its_result(folder, tmp_path, monkeypatch):
    (folder / "search.yaml").write_text(yaml.safe_dump(asked(folder, {"recipe": "mix.yaml"})))
    result = mergetool.run(folder / "search.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out.partial.parts").exists()
    mergetool.run(folder / "mix.yaml", output=tmp_path / "mix")
    plain = mergetool.run(asked(folder, str(tmp_path / "mix")), output=tmp_path / "plain")
    assert_same_bytes(read(result.path), read(plain.path))
    reports = [json.loads((tmp_path / f"{name}.search" / "report.json").read_text()) for name in ("out", "plain")]
    assert reports[0]["compared"] == reports[1]["compared"]
    (folder / "mix.yaml").unlink()  # what is written holds all of it
    monkeypatch.chdir("/")
    for name in ("recipe", "parent"):
        mergetool.run(tmp_path / "out.search" / f"{name}.yaml")
    assert_same_bytes(read(tmp_path / "out.search" / "winner"), read(result.path))


def test_a_base_may_be_made_too(folder, tmp_path):
    made = {"models": {"a": str(folder / "models" / "base")}, "merge": {"method": "passthrough"}}
    result = mergetool.run({**recipe(folder, **SHORT), "base": {"recipe": made}}, output=tmp_path / "out")
    assert_same_bytes(read(result.path), read(mergetool.run(tmp_path / "out.search" / "recipe.yaml").path))


def test_what_was_made_before_a_search_that_failed_is_not_made_again(folder, tmp_path, monkeypatch):
    search = tuning_run.run_inner
    made = asked(folder, {"recipe": str(folder / "mix.yaml")})
    broken = {**made, "merge": {**made["merge"], "tasks": [{"name": "absent", "include": str(folder / "models")}]}}
    with pytest.raises(mergetool.MergetoolError, match="absent"):
        mergetool.run(broken, output=tmp_path / "out")
    first = []
    monkeypatch.setattr(tuning_run, "run_inner", lambda *args: first.append(search(*args)))
    mergetool.run(made, output=tmp_path / "out")
    assert first == [{}]
    assert not (tmp_path / "out.partial.parts").exists()


def test_what_lies_in_the_place_of_results_inside_is_left_alone(folder, tmp_path):
    (tmp_path / "out.partial.parts").mkdir()
    (tmp_path / "out.partial.parts" / "diary").write_text("mine")
    with pytest.raises(mergetool.OutputError, match="in the way"):
        mergetool.run(asked(folder, {"recipe": str(folder / "mix.yaml")}), output=tmp_path / "out")
