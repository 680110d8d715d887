"""Models on the Hub whose networks run: planned from headers and configs, measured and scored once they have come."""

import pytest

from tests.dense import write_dense
from tests.files import content, write_recipe
from tests.hub.server import TOKEN
from tests.statistics.networks import write_classifier, write_rows
from tests.tuning.planted import World

EXPERTS = {"base": {"prompts": ["w1 w2"]}, "a": {"prompts": ["w3"]}}


@pytest.fixture(scope="module", autouse=True)
def networks(near_hub):
    """What builds them is imported once for all commands."""
    near_hub.know("transformers.modeling_utils")


def test_models_that_are_not_here_yet_are_planned_and_measured_after_fetching(hub, call, tmp_path):
    for seed, name in enumerate(("one", "two")):
        hub.upload(f"org/{name}", write_classifier(tmp_path / "made" / name, seed))
    write_rows(tmp_path / "rows.jsonl")
    asked = {
        "models": {"one": "org/one", "two": "org/two"},
        "calibration": {"data": "rows.jsonl"},
        "merge": {"method": "regmean"},
        "output": {"path": "out"},
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", **asked)
    planned = call("plan", recipe, "--json")
    assert planned.code == 0, planned.err
    assert planned.answer["statistics"]["model 'one'"]["rows"] == 7
    assert hub.asked("tokenizer") == []
    done = call("run", recipe, "--cache", "cache")
    assert done.code == 0, done.err
    here = {"models": {name: f"made/{name}" for name in ("one", "two")}, "output": {"path": "local"}}
    assert call("run", write_recipe(tmp_path / "local.yaml", **asked | here), "--cache", "cache").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 2


def test_a_mixture_is_planned_from_headers_and_run_after_fetching(hub, call, tmp_path):
    for seed, name in enumerate(("dense", "expert")):
        hub.upload(f"org/{name}", write_dense(tmp_path / "made" / name, seed=seed))
    merge = {"method": "moe", "experts": EXPERTS}
    asked = {"base": "org/dense", "models": {"a": "org/expert"}, "merge": merge, "output": {"path": "out"}}
    recipe = write_recipe(tmp_path / "moe.yaml", **asked)
    planned = call("plan", recipe, "--json")
    assert planned.code == 0, planned.err
    told = {step["name"]: step["method"] for step in planned.answer["steps"]}
    assert told["model.layers.2.block_sparse_moe.experts.1.w2.weight"] == "expert"
    assert len(hub.asked("^cdn/files")) == 2  # the beginning of each
    assert hub.asked("tokenizer") == []
    done = call("run", recipe)
    assert done.code == 0, done.err
    here = {"base": "made/dense", "models": {"a": "made/expert"}, "output": {"path": "local"}}
    assert call("run", write_recipe(tmp_path / "local.yaml", **asked | here)).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_a_result_is_pushed_when_it_is_scored(hub, call, tmp_path):
    world = World()
    models = world.write(tmp_path)
    sections = {
        "models": {name: models[name] for name in ("left", "right")},
        "merge": {"method": "linear"},
        "output": {"path": "out", "hub": {"repo": "me/merged", "create": True}},
        "evaluate": [{"name": "lefts", "include": "tasks"}],
    }
    recipe = write_recipe(tmp_path / "scored.yaml", **sections)
    done = call("run", recipe, "--json", token=TOKEN)
    assert done.code == 0, done.err + done.out
    assert done.answer["pushed"]["repo"] == "me/merged"
    card = hub.read("me/merged", "README.md").decode()
    assert "| lefts | acc | 60 |" in card
    assert hub.read("me/merged", "mergetool.json") == (tmp_path / "out" / "mergetool.json").read_bytes()
    told = call("run", recipe, "--overwrite", "--json")  # nobody is logged in: told before anything is merged
    assert (told.code, "log in" in told.answer["fix"]) == (8, True)
