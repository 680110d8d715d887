"""The bytes of a merge depend neither on the threads that torch may use, nor on workers, nor on who merges."""

import os
import subprocess
import sys

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


@pytest.mark.parametrize("name", METHODS)
def test_bytes_do_not_depend_on_threads_or_workers(name, models, tmp_path):
    path = write_recipe(
        tmp_path / "r.yaml",
        **({} if name == "slerp" else {"base": str(models / "base")}),
        models={model: str(models / model) for model in "ab"},
        merge=METHODS[name],
    )
    found = []
    for threads, workers in ((1, 2), (2, 1)):
        output = tmp_path / f"out-{threads}-{workers}"
        command = [sys.executable, "-m", "mergetool", "run", str(path), "-o", str(output), "--workers", str(workers)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, timeout=300)
        found.append(load_file(output / "model.safetensors"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        base, *given = (load_file(models / model / "model.safetensors") for model in ("base", "a", "b"))
        own = None if name == "slerp" else base
        found.append(mergetool.merge_state_dicts(METHODS[name], dict(zip("ab", given, strict=True)), own))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[tensor], value) for tensor, value in found[0].items())
