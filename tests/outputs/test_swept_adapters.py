"""Several adapters in one run: each has the bytes of a run of its own."""

import json

import pytest

import mergetool
from mergetool.errors import PlanError
from mergetool.outputs.verify import verify_output
from mergetool.recipe.load import load_recipe
from tests.files import content, write_recipe
from tests.forks import clean_environment
from tests.outputs.test_adapter import NETWORKS, fine_tuned
from tests.outputs.test_merged_adapters import ALL, llama, three

WEIGHTS = "adapter_model.safetensors"


def assert_as_alone(recipe, folder):
    """Every result is that of its own recipe, run by itself."""
    result = mergetool.run(recipe)
    assert [path.name for path in result.results] == list(recipe.points)
    for name, point in recipe.points.items():
        alone = mergetool.run(point, output=folder / "alone" / name).path
        for file in (WEIGHTS, "adapter_config.json"):
            assert (result.path / name / file).read_bytes() == (alone / file).read_bytes()
        locks = [json.loads((each / "mergetool.json").read_text()) for each in (result.path / name, alone)]
        same = ("plan", "recipe", "resolved_sha256", "inputs", "notes", "measured")
        assert [{key: lock[key] for key in same} for lock in locks[:1]] == [{key: locks[1][key] for key in same}]
        assert locks[0]["output"]["files"].keys() == locks[1]["output"]["files"].keys()
    assert len({(path / WEIGHTS).read_bytes() for path in result.results}) == len(result.results)
    assert verify_output(result.path)["results"] == list(recipe.points)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A recipe of three adapters, and their folder."""
    folder = tmp_path_factory.mktemp("alone")
    three(folder, llama, target_modules=ALL)
    return write_recipe(
        folder / "r.yaml",
        models={name: {"adapter": name} for name in "abc"},
        merge={"method": "task-arithmetic"},
        then=[{"step": "lines", "first": 0.5}],
        sweep={"scale": [0.5, 1.0], "lines.last": [1.0, 2.0]},
        output={"path": "out"},
    )


def test_of_adapters_by_themselves(alone, tmp_path):
    assert_as_alone(load_recipe(alone), tmp_path)


def test_a_kill_is_made_good(forks, alone, tmp_path):
    whole = content(mergetool.run(alone, output=tmp_path / "whole").path)
    for moment in ("mergetool.outputs.journal:Journal.unit 7", "mergetool.outputs.output:describe_run 2"):
        killed = forks.run(
            ["run", alone, "-o", tmp_path / "out"], cwd=tmp_path, env=clean_environment() | {"KILL_AFTER": moment}
        )
        assert killed.code == -9, killed.err
    again = forks.run(["run", alone, "-o", tmp_path / "out"], cwd=tmp_path, env=clean_environment())
    assert again.code == 0, again.err
    assert content(tmp_path / "out") == whole


def test_of_whole_models_cut_to_what_they_need(tmp_path):
    kind, config = NETWORKS["llama"]
    for seed in (1, 2):
        fine_tuned(kind, config, tmp_path, seed=seed)
    sections = {
        "base": "base",
        "models": {name: name for name in ("tuned1", "tuned2")},
        "output": {"path": "out", "kind": "adapter", "rank": {"energy": 0.6}},
    }
    sweep = {"density": [0.2, 0.7]}
    path = write_recipe(tmp_path / "r.yaml", **sections, merge={"method": "ties"}, sweep=sweep)
    assert_as_alone(load_recipe(path), tmp_path)
    whole = write_recipe(tmp_path / "m.yaml", **sections, merge={"method": "ties", "scope": "model"}, sweep=sweep)
    with pytest.raises(PlanError, match="one result a run"):
        mergetool.run(whole, output=tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
