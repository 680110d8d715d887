"""Inputs of the reference numbers in data/mass_reference.safetensors, and the numbers."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

NUM_FEATURES, RANK, NUM_SAMPLES = 12, 3, 10


def reference_bases(num_tasks: int) -> Tensor:
    """Right singular vectors (tasks, k, features), float64, of as many tasks."""
    random = np.random.RandomState(504)
    drawn = torch.from_numpy(random.standard_normal((num_tasks, NUM_FEATURES, RANK)))
    return torch.linalg.qr(drawn)[0].mT.contiguous()


def reference_features() -> Tensor:
    """Features (samples, features), float64."""
    return torch.from_numpy(np.random.RandomState(5342).standard_normal((NUM_SAMPLES, NUM_FEATURES)))


def reference_numbers() -> dict[str, Tensor]:
    """What the authors' code makes of them."""
    return load_file(Path(__file__).parent / "data" / "mass_reference.safetensors")
