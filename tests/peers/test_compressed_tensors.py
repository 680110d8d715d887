"""4-bit floats of compressed-tensors give its numbers, to the bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import mergetool

FOLDER = Path(__file__).parent / "compressed_tensors"


def test_codes_are_dequantised_as_compressed_tensors_does_it(tmp_path):
    recipe = {"models": {"a": str(FOLDER / "codes.safetensors")}, "merge": {"method": "passthrough"}}
    result = mergetool.run({**recipe, "output": {"dtype": "float32"}}, output=tmp_path / "out")
    written, expected = load_file(result.path / "model.safetensors"), load_file(FOLDER / "numbers.safetensors")
    assert written.keys() == expected.keys() == {"nvfp4.weight", "mxfp4.weight"}
    for name, value in expected.items():
        assert torch.equal(written[name], value), name
