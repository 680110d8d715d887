"""Models on the Hub inside a recipe that is inside another one: planned from a distance, fetched once, pinned."""

import json

from tests.files import content, write_recipe


def test_models_of_recipes_inside_are_planned_from_headers_and_fetched_once(hub, call, recipe, tmp_path):
    made = tmp_path / "made"
    outer = {
        "base": "org/base",
        "models": {"mix": {"recipe": "recipe.yaml"}, "a": "org/a"},
        "merge": {"method": "ties"},
    }
    path = write_recipe(tmp_path / "outer.yaml", **outer, output={"path": "outer"})
    planned = call("plan", path, "--json").answer
    weights = sum((made / name / "model.safetensors").stat().st_size for name in ("base", "a", "b"))
    assert planned["bytes_to_download"] >= weights
    assert planned["inner"]["mix"]["models"] == ["a", "b"]
    assert len(hub.asked("^cdn/files")) == 4  # one header each, and that of org/a for both recipes
    done = call("run", path)
    assert done.code == 0, done.err
    assert done.err.count("fetching org/a") == 1
    local = {"a": str(made / "a"), "b": str(made / "b")}
    inner = {"recipe": {"models": local, "merge": {"method": "linear"}}}
    asked = {
        **outer,
        "base": str(made / "base"),
        "models": {"mix": inner, "a": local["a"]},
        "output": {"path": "local"},
    }
    assert call("run", write_recipe(tmp_path / "local.yaml", **asked)).code == 0
    assert content(tmp_path / "outer") == content(tmp_path / "local")
    lock = json.loads((tmp_path / "outer/mergetool.json").read_text())
    assert lock["origins"]["mix/b"][0]["commit"] == hub.refs("org/b")["main"]
    card = (tmp_path / "outer/README.md").read_text()
    assert f"org/b@{hub.refs('org/b')['main']}" in card  # in the recipe inside, too
    assert "- org/b" in card.partition("---\n\n")[0]
    assert call("run", path, "--overwrite", "--locked").code == 0
