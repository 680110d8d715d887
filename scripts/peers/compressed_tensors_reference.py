#!/usr/bin/env python3
"""Write weights as compressed-tensors packs 4-bit floats, and the numbers that it makes of them again.

    python -m venv ct && ct/bin/pip install torch==2.13.0 compressed-tensors==0.20.1 safetensors
    ct/bin/python scripts/peers/compressed_tensors_reference.py

Writes tests/peers/compressed_tensors/codes.safetensors (a model's tensors) and numbers.safetensors.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import MXFP4, NVFP4
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "peers" / "compressed_tensors"
KINDS = {"nvfp4": (NVFP4PackedCompressor, NVFP4, 16), "mxfp4": (MXFP4PackedCompressor, MXFP4, 32)}


def main() -> None:
    torch.manual_seed(0)
    codes, numbers = {}, {}
    for kind, (compressor, settings, group) in KINDS.items():
        scheme = QuantizationScheme(targets=["Linear"], **settings)
        weight = 0.05 * torch.randn(24, 96)
        scale = weight.view(24, -1, group).abs().amax(-1) / 6
        state = {"weight": weight, "weight_scale": scale}
        if kind == "nvfp4":
            overall = 448 / scale.max()
            state |= {"weight_scale": (scale * overall).to(torch.float8_e4m3fn).float()}
            state["weight_global_scale"] = overall.reshape(1)
        packed = compressor.compress(state, scheme)
        numbers[f"{kind}.weight"] = restored(compressor, packed, scheme)
        codes |= {f"{kind}.{name}": value.contiguous() for name, value in packed.items()}
    metadata = {"compressed-tensors": version("compressed-tensors"), "torch": version("torch")}
    FOLDER.mkdir(exist_ok=True)
    save_file(codes, FOLDER / "codes.safetensors", metadata)
    save_file(numbers, FOLDER / "numbers.safetensors", metadata)


def restored(
    compressor: type[NVFP4PackedCompressor], packed: dict[str, torch.Tensor], scheme: QuantizationScheme
) -> torch.Tensor:
    """What its decompression does, in float32 where that takes bfloat16."""
    rows, width = packed["weight_packed"].shape
    return dequantize(
        x_q=unpack_fp4_from_uint8(packed["weight_packed"], rows, 2 * width, dtype=torch.float32),
        scale=compressor._decompress_scale(packed["weight_scale"], torch.float32),
        args=scheme.weights,
        global_scale=packed.get("weight_global_scale"),
        dtype=torch.float32,
    )


if __name__ == "__main__":
    main()
