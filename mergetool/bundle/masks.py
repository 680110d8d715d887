"""Experts that are masks of one shared change (EMR-Merging, TALL masks): one bit an entry each, and a scale.

An expert's change of a tensor is its scale times the entries of the shared change that its mask keeps. The shared
change lies in a file of its own; the masks, and the directions that a router reads, in the files of the tasks. A group
of several tasks has the mean of their changes.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mergetool.bundle.factors import TaskFactors
from mergetool.bundle.files import SHARED
from mergetool.bundle.manifest import Manifest
from mergetool.kernels.unified import unpacked


class MaskedFactors(TaskFactors):
    """The masks of all tasks and what they are masks of, in memory."""

    def __init__(self, manifest: Manifest, folder: Path, dtype: torch.dtype, cache_bytes: int) -> None:
        super().__init__(manifest, folder, dtype, cache_bytes)
        with safe_open(folder / SHARED, framework="pt") as file:
            self._shared = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        super().to(device, dtype)
        self._shared = {name: value.to(device) for name, value in self._shared.items()}

    def in_full(self, task: int, name: str) -> Tensor:
        """Its entries of the shared change, float32."""
        return kept_entries(self._shared[name], self._stored[task][mask_of(name)], self.manifest.tasks[task].scale)


def kept_entries(shared: Tensor, bits: Tensor, scale: float | None) -> Tensor:
    """The entries that a mask keeps, times the scale, in float32; those that it drops are 0."""
    kept = shared.float() * unpacked(bits, tuple(shared.shape))
    return kept if scale is None else kept.mul_(scale)


def masked_change(folder: Path, factors: str | Path, name: str, scale: float | None) -> Tensor:
    """One expert's change of a tensor, read from a bundle."""
    with safe_open(folder / SHARED, framework="pt") as shared, safe_open(folder / factors, framework="pt") as own:
        return kept_entries(shared.get_tensor(name), own.get_tensor(mask_of(name)), scale)


def mask_of(name: str) -> str:
    """What a task's file calls its mask of a tensor."""
    return f"{name}.mask"


def open_factors(manifest: Manifest, folder: Path, dtype: torch.dtype, cache_bytes: int) -> TaskFactors:
    """What a bundle keeps of its experts, in memory."""
    kind = MaskedFactors if (folder / SHARED).is_file() else TaskFactors
    return kind(manifest, folder, dtype, cache_bytes)
