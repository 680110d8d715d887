"""Layers cut and stacked as mergekit does: our recipes of mergekit/slices.yaml give the numbers of mergekit's."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

import mergetool
from tests.peers.checkpoints import sample, summary, write_families

FOLDER = Path(__file__).parent / "mergekit"
CASES = yaml.safe_load((FOLDER / "slices.yaml").read_text())
EXPECTED = load_file(FOLDER / "slices.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_families(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_slices_give_the_numbers_of_mergekit(case, models, tmp_path):
    (models / f"{case}.yaml").write_text(yaml.safe_dump(CASES[case]["ours"], sort_keys=False))
    result = mergetool.run(models / f"{case}.yaml", output=tmp_path / "out")
    with safe_open(result.path / "model.safetensors", framework="np") as opened:
        merged = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    names = EXPECTED[f"{case}/names"].tobytes().decode().split("\n")
    assert sorted(merged) == names
    samples = np.concatenate([sample(name, merged[name]) for name in names])
    np.testing.assert_allclose(samples, EXPECTED[f"{case}/samples"], rtol=0, atol=2e-6)
    totals = np.stack([summary(merged[name]) for name in names])
    np.testing.assert_allclose(totals, EXPECTED[f"{case}/summary"], rtol=1e-5, atol=1e-4)
