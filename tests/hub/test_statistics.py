"""Models on the Hub that are measured: planned from headers and configs, measured once they have come."""

from tests.files import content, write_recipe
from tests.statistics.networks import write_classifier, write_rows


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
