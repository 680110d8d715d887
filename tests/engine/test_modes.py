"""Who may read what a run writes is for the umask to say: of every file and folder, whatever wrote it."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

import mergetool
from mergetool.tensors.io import sha256_file
from mergetool.tensors.writer import write_tensors
from tests.bundle.test_runs import models, recipe  # noqa: F401  (a fixture)
from tests.files import write_models, write_recipe
from tests.methods import test_repair as repairs
from tests.tuning import test_run as searches
from tests.tuning.planted import World


def modes(*places):
    """(of files, of folders): every mode that is found."""
    paths = [path for place in places for path in (place, *place.rglob("*"))]
    found = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in paths]
    return {mode for folder, mode in found if not folder}, {mode for folder, mode in found if folder}


@pytest.fixture(params=[0o002, 0o077], ids=["open", "closed"])
def umask(request):
    """A umask that leaves more than usual, and one that leaves less; what it makes of (files, folders)."""
    before = os.umask(request.param)
    yield {0o666 & ~request.param}, {0o777 & ~request.param}
    os.umask(before)


def test_a_checkpoint(umask, tmp_path):
    write_models(tmp_path)
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/tokenizer.json").chmod(0o600)
    asked = write_recipe(
        tmp_path / "r.yaml",
        base="base",
        models={"a": "a", "b": "b"},
        merge={"method": "tsv-merge"},
        output={"path": "out", "shard_size": 1000},
    )
    mergetool.run(asked, cache=tmp_path / "cache")
    assert modes(tmp_path / "out", tmp_path / "cache") == umask


def test_a_bundle_with_heads(umask, models, tmp_path):  # noqa: F811
    mergetool.run(recipe(models), output=tmp_path / "out", cache=tmp_path / "cache")
    assert list((tmp_path / "out/heads").iterdir())
    assert modes(tmp_path / "out", tmp_path / "cache") == umask


def test_permutations_and_what_repair_changed(umask, tmp_path):
    (tmp_path / "build.py").write_text(repairs.BUILD)
    save_file({"x": torch.randn(60, 6)}, tmp_path / "rows.safetensors")
    out = repairs.run(repairs.recipe(tmp_path, repairs.unrelated(), repairs.MLP_REPAIR)).path
    assert (out / "alignment/permutations.safetensors").is_file()
    assert modes(out) == umask


def test_a_search_and_its_cache(umask, tmp_path):
    World(count=12).write(tmp_path)
    asked = searches.recipe(tmp_path, search={"population": 2, "generations": 1})
    mergetool.run(asked, output=tmp_path / "out", cache=tmp_path / "cache")
    assert modes(tmp_path / "out", tmp_path / "out.search", tmp_path / "cache") == umask


def test_a_small_file_has_the_bytes_that_safetensors_writes(tmp_path):
    tensors = {"b": torch.randn(3, 4).mT, "a": torch.tensor(2, dtype=torch.int64), "empty": torch.zeros(0, 2).half()}
    write_tensors(tmp_path / "ours", tensors, {"k": "1"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"k": "1"})
    assert sha256_file(tmp_path / "ours") == sha256_file(tmp_path / "theirs")
