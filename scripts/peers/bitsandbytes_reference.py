#!/usr/bin/env python3
"""Write weights as bitsandbytes quantises them, and the numbers that it makes of them again.

    python -m venv bnb && bnb/bin/pip install torch==2.13.0 bitsandbytes==0.50.2 safetensors
    bnb/bin/python scripts/peers/bitsandbytes_reference.py

Writes tests/peers/bitsandbytes/codes.safetensors (a model's tensors) and numbers.safetensors.
"""

from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "peers" / "bitsandbytes"


def main() -> None:
    torch.manual_seed(0)
    codes, numbers = {}, {}
    for kind, nested, shape in (("nf4", True, (128, 140)), ("nf4", False, (24, 72)), ("fp4", True, (24, 72))):
        name = f"{kind}.{'nested' if nested else 'plain'}.weight"
        packed, state = bnb.quantize_4bit(0.05 * torch.randn(shape), quant_type=kind, compress_statistics=nested)
        codes[name] = packed
        codes |= {f"{name}.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()}
        numbers[name] = bnb.dequantize_4bit(packed, state)
    packed, scales, _ = bnb.int8_vectorwise_quant((0.05 * torch.randn(24, 72)).half())
    codes |= {"int8.weight": packed, "int8.SCB": scales, "int8.weight_format": torch.tensor(0, dtype=torch.uint8)}
    numbers["int8.weight"] = bnb.int8_vectorwise_dequant(packed, scales)
    metadata = {"bitsandbytes": version("bitsandbytes"), "torch": version("torch")}
    save_file(codes, FOLDER / "codes.safetensors", metadata)
    save_file(numbers, FOLDER / "numbers.safetensors", metadata)


if __name__ == "__main__":
    main()
