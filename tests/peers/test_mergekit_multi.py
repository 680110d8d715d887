"""Files of several documents give the numbers of mergekit-multi, in one run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import mergetool
from tests.peers.checkpoints import sample, shapes, summary, write_families

FOLDER = Path(__file__).parent / "mergekit" / "multi"
EXPECTED = load_file(FOLDER / "outputs.safetensors")
BFLOAT16 = 2**-7  # the distance between neighbours, relative to the value: mergekit rounds at every step


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_families(folder)
    return folder


@pytest.fixture
def merged(models, tmp_path, monkeypatch):
    """Run a file beside the models; all tensors of the result."""
    monkeypatch.chdir(models)

    def run(path, name="out"):
        mergetool.run(path, output=tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    return run


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_of_several_documents_gives_the_numbers_of_mergekit_multi(path, merged, tmp_path):
    found = {name: tensor.float().numpy() for name, tensor in merged(path).items()}
    assert found.keys() == shapes("qwen2" if "qwen2" in path.read_text() else "llama").keys()
    tolerance = BFLOAT16 if "bfloat16" in path.read_text() else 2e-6
    samples = np.concatenate([sample(name, found[name]) for name in sorted(found)])
    np.testing.assert_allclose(samples, EXPECTED[f"{path.stem}/samples"], rtol=tolerance, atol=tolerance / 4)
    totals = np.stack([summary(found[name]) for name in sorted(found)])
    np.testing.assert_allclose(totals[:, 1], EXPECTED[f"{path.stem}/summary"][:, 1], rtol=tolerance)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_what_a_mergekit_file_computes_on_the_way_is_not_rounded_to_its_dtype(merged, tmp_path):
    text = (FOLDER / "sixteen-bits.yaml").read_text()
    (tmp_path / "wide.yaml").write_text(text.replace("bfloat16", "float32"))
    (tmp_path / "told.yaml").write_text(text.replace("dtype: bfloat16", "dtype: bfloat16\nout_dtype: bfloat16"))
    found = merged(FOLDER / "sixteen-bits.yaml")
    wide = merged(tmp_path / "wide.yaml", "wide")
    assert all(torch.equal(found[name], wide[name].bfloat16()) for name in found)
    told = merged(tmp_path / "told.yaml", "told")
    assert not all(torch.equal(found[name], told[name]) for name in found)
