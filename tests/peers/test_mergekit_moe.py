"""Files of mergekit-moe give what mergekit-moe makes of them: the same weights to the bit, the same rows of gates."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

import mergetool
from tests.peers.checkpoints import write_families
from tests.peers.mixtures import compared, write_tokenizers

FOLDER = Path(__file__).parent / "mergekit"
CASES = yaml.safe_load((FOLDER / "moe.yaml").read_text())
EXPECTED = load_file(FOLDER / "moe.safetensors")

BFLOAT16 = 2e-2
"""How far rows are from those that are measured in bfloat16, at most."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_families(folder)
    write_tokenizers(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_mergekit_moe_gives_its_weights_and_gates(models, case, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(CASES[case], sort_keys=False))
    mergetool.run(tmp_path / "moe.yml", output=tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        found = compared({name: opened.get_tensor(name).float().numpy() for name in opened.keys()})  # noqa: SIM118
    for dtype, tolerance in (("float32", 2e-6), ("bfloat16", BFLOAT16)):
        wanted = {key.partition("/")[2]: value for key, value in EXPECTED.items() if key.startswith(f"{case} {dtype}/")}
        assert found["digest"].tobytes() == wanted.pop("digest").tobytes()
        assert bool(wanted) == (case != "random")
        for name, gate in wanted.items():
            stored = 2**-8 if CASES[case].get("dtype") == "bfloat16" else 0  # rounded once, here and there
            np.testing.assert_allclose(found[name], gate, rtol=stored, atol=tolerance, err_msg=name)
