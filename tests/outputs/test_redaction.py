"""Locks and cards tell nothing of the machine: no absolute path, and still `--locked`, `verify` and the recipe work."""

from dataclasses import replace
from pathlib import Path

import pytest

from mergetool.engine.run import Flags, run_recipe
from mergetool.errors import HubError, SourceError
from mergetool.outputs.push import push, push_target
from mergetool.outputs.redaction import redacted
from mergetool.outputs.verify import verify_output
from mergetool.recipe import load_recipe
from mergetool.tensors.hub_upload import Target
from mergetool.testing.toys import MLP
from tests.files import tensors, write_model, write_recipe

MATRICES = {f"model.layers.{layer}.mlp.weight": (12, 9) for layer in range(2)} | {"model.norm.weight": (9,)}


@pytest.fixture
def models(tmp_path):
    """One of them inside the recipe's folder, the others elsewhere; all are named by absolute paths."""
    places = {"base": tmp_path / "recipes" / "base", "a": tmp_path / "large disk" / "a", "b": tmp_path / "b"}

    def make(shapes):
        for seed, path in enumerate(places.values()):
            write_model(path, tensors(seed, shapes), config={"_name_or_path": str(path), "model_type": "toy"})
        return {name: str(path) for name, path in places.items()}

    return make


def recipe_of(folder, paths, merge):
    """As a person on this machine would write it."""
    fine_tunes = {"a": paths["a"], "b": {"source": paths["b"]}}
    base = {} if merge["method"] in ("linear", "c2m3") else {"base": paths["base"]}
    rest = {"architecture": "mlp"} if merge["method"] == "c2m3" else {}
    output = {"path": str(folder / "results" / "out")}
    path = write_recipe(folder / "recipes" / "r.yaml", **base, models=fine_tunes, merge=merge, output=output, **rest)
    return load_recipe(path, settings=[f"models.a={paths['a']}"])


@pytest.mark.parametrize("method", ["ties", "c2m3", "mass"])
def test_no_file_of_a_result_holds_an_absolute_path(tmp_path, models, method):
    shapes = MLP if method == "c2m3" else MATRICES
    merge = {"method": method} | ({"router": {"layers": ["*"]}} if method == "mass" else {})
    recipe = recipe_of(tmp_path, models(shapes), merge)
    path = run_recipe(recipe).path
    own = [each for each in path.rglob("*") if each.is_file() and each.parent.name != "base"]  # a copy of the base
    assert path == tmp_path / "results" / "out"
    assert [each for each in own if str(tmp_path).encode() in each.read_bytes()] == []
    card = (path / "README.md").read_text()
    assert ("base: base" in card) is (method != "c2m3")  # inside the recipe's folder: relative to it
    if method != "mass":
        verify_output(path)
    again = run_recipe(recipe, Flags(locked=True, overwrite=True)).path
    assert (again / "README.md").read_text() == card


def test_locked_still_sees_another_input(tmp_path, models):
    paths = models(MATRICES)
    recipe = recipe_of(tmp_path, paths, {"method": "linear"})
    run_recipe(recipe)
    write_model(Path(paths["a"]), tensors(7, MATRICES))
    with pytest.raises(SourceError, match="SHA-256 differ"):
        run_recipe(recipe, Flags(locked=True, overwrite=True))


def test_a_bundle_that_refers_to_its_base_is_not_pushed(tmp_path, models):
    recipe = recipe_of(tmp_path, models(MATRICES), {"method": "mass", "base": "reference", "router": {"layers": ["*"]}})
    with pytest.raises(HubError, match="a path on this machine"):
        push(run_recipe(recipe).path, Target("me/bundle"))
    asked = recipe.output.model_copy(update={"hub": {"repo": "me/bundle"}})
    with pytest.raises(HubError, match="a path on this machine"):
        push_target(replace(recipe, output=asked), None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/recipes/a", "a"),
        ("/home/me/recipes/sub/a.safetensors", "sub/a.safetensors"),
        ("/mnt/my disk/a", "a"),
        ("models.a=/mnt/disk/a", "models.a=a"),
        ("models={a: /mnt/disk/a, b: '/home/me/recipes/b'}", "models={a: a, b: 'b'}"),
        ("../a", "../a"),
        ("org/name@main", "org/name@main"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("0.5 of a/b", "0.5 of a/b"),
        (3, 3),
    ],
)
def test_paths(text, shown):
    assert redacted({"x": [text]}, Path("/home/me/recipes")) == {"x": [shown]}
