"""Inputs of the reference numbers in data/tsv_reference.safetensors, and the numbers."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "mlp.up": (30, 20),
    "mlp.down": (20, 30),
    "attn.out": (24, 24),
    "text_projection": (12, 12),
    "conv": (4, 3, 2, 2),
    "norm": (24,),
}


def reference_deltas() -> list[dict[str, Tensor]]:
    """Task vectors of three tasks, float64, from numpy's frozen legacy generator: the same on every machine."""
    random = np.random.RandomState(2412)
    return [
        {
            name: torch.from_numpy(random.standard_normal(shape) / np.arange(1, shape[-1] + 1) ** 0.7)
            for name, shape in SHAPES.items()
        }
        for _ in range(3)
    ]


def reference_numbers() -> dict[str, Tensor]:
    """What the authors' code makes of them."""
    return load_file(Path(__file__).parent / "data" / "tsv_reference.safetensors")
