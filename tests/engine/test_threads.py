"""The bytes of a merge depend neither on the threads that torch may use, nor on workers, nor on who merges."""

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from tests.files import write_model, write_recipe

METHODS = {
    "tsv-merge": {"method": "tsv-merge"},
    "iso-c": {"method": "iso-c"},
    "slerp": {"method": "slerp", "t": 0.3},
    "dare-ties": {"method": "dare-ties", "density": 0.5, "rescale": "l1"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for model in ("base", "a", "b"):
        write_model(
            folder / model, {f"layers.{i}.weight": torch.randn(512, 384, generator=generator) for i in range(2)}
        )
    return folder


def recipe_of(name, models, folder):
    return write_recipe(
        folder / f"{name}.yaml",
        **({} if name == "slerp" else {"base": str(models / "base")}),
        models={model: str(models / model) for model in "ab"},
        merge=METHODS[name],
    )


@pytest.fixture(scope="module")
def merged(forks, models, tmp_path_factory):
    """By the threads that torch may use and the workers: a folder with the result of every method."""
    folder = tmp_path_factory.mktemp("merged")
    recipes = [recipe_of(name, models, folder) for name in METHODS]
    for threads, workers in ((1, 2), (2, 1)):
        (done,) = forks.python("-c", MERGE_ALL, threads, folder / f"{threads}-{workers}", workers, *recipes).wait()
        assert done.code == 0, done.err
    return sorted(folder.glob("*-*/"))


MERGE_ALL = """
import sys
from pathlib import Path
import torch
import mergetool
threads, out, workers, *recipes = sys.argv[1:]
torch.set_num_threads(int(threads))
for recipe in recipes:
    mergetool.run(recipe, output=Path(out) / Path(recipe).stem, workers=int(workers), fork=True)
"""
"""As the command does it, which forks its workers."""


@pytest.mark.parametrize("name", METHODS)
def test_bytes_do_not_depend_on_threads_or_workers(name, models, merged):
    results = [load_file(folder / name / "model.safetensors") for folder in merged]
    assert len(results) == 2
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        base, *given = (load_file(models / model / "model.safetensors") for model in ("base", "a", "b"))
        own = None if name == "slerp" else base
        results.append(mergetool.merge_state_dicts(METHODS[name], dict(zip("ab", given, strict=True)), own))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[tensor], value) for tensor, value in results[0].items())
