"""Experts that changed nearly the same, which no router can tell apart: found from the factors that a bundle stores.

The cosine of two experts is that of their changes, all tensors together:

    <A, B> / (|A| |B|),    <A, B> = sum over tensors of tr(A^T B)

Copies have 1, with noise a little less, fine-tunes on different tasks less than 0.3. So has a second training on a task
from another seed, which is not found.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergetool.bundle.files import triplet_names, whole_name
from mergetool.bundle.manifest import Manifest
from mergetool.errors import SourceError
from mergetool.kernels.routing import as_cosines, inner_products
from mergetool.kernels.spectral import Factors, concatenated, grams

LIMIT = 0.7
"""Experts whose cosine is larger are alike."""
_MOST = 32
"""Leading directions of a tensor that are compared: they hold most of what changed, and large models stay quick."""
_PIECE = 1 << 18
"""Elements of dense changes that are compared at a time."""


@dataclass(frozen=True)
class Alike:
    """Two experts that changed nearly the same."""

    one: str
    other: str
    cosine: float

    def __str__(self) -> str:
        return f"`{self.one}` and `{self.other}` changed nearly the same (cosine {self.cosine:.2f})"


def alike(folder: Path, manifest: Manifest) -> list[Alike]:
    """Every two experts that changed nearly the same, the most alike first. Raises SourceError for a damaged file."""
    return pairs_of(manifest.names, cosines(folder, manifest)) if len(manifest.tasks) > 1 else []


def pairs_of(names: Sequence[str], cosines: Tensor) -> list[Alike]:
    """Those of these experts that changed nearly the same, by the cosines (T, T) of all; the most alike first."""
    found = cosines.tolist()
    pairs = [Alike(names[i], names[j], value) for i, row in enumerate(found) for j, value in enumerate(row) if i < j]
    return sorted((pair for pair in pairs if pair.cosine > LIMIT), key=lambda pair: -pair.cosine)


def cosines(folder: Path, manifest: Manifest) -> Tensor:
    """Of the changes of every two experts, (T, T). Raises SourceError for a damaged file."""
    inner = torch.zeros(len(manifest.tasks), len(manifest.tasks), dtype=torch.float64)
    with ExitStack() as opened:
        files = [_File(opened, folder / task.factors) for task in manifest.tasks]
        for name, parameter in manifest.parameters.items():
            if parameter.policy == "full":
                inner += changes_in_full([file.whole(name) for file in files])
            elif parameter.ranks:
                inner += _inner([file.leading(name, parameter.shape) for file in files])
    return as_cosines(inner)


def changes_in_full(changes: Sequence[Tensor]) -> Tensor:
    """Inner products (T, T), float64, of dense changes; piece by piece, for all of them widened may be very large."""
    flat = [change.reshape(-1) for change in changes]
    inner = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat[0].numel(), _PIECE):
        wide = torch.stack([change[start : start + _PIECE] for change in flat]).double()
        inner += (wide @ wide.mT).cpu()
    return inner


def leading_products(gram_left: Tensor, gram_right: Tensor, s: Tensor, ranks: Sequence[int]) -> Tensor:
    """Inner products (T, T), float64, of the leading directions of changes; their `grams` side by side, and ranks."""
    sizes = [min(rank, _MOST) for rank in ranks]
    starts = accumulate(ranks, initial=0)
    places = torch.tensor([start + each for start, size in zip(starts, sizes, strict=False) for each in range(size)])
    places = places.to(s.device, torch.long)
    left, right = (gram[places[:, None], places] for gram in (gram_left, gram_right))
    return inner_products(left, right, s[places], sizes).double().cpu()


def _inner(tasks: Sequence[Factors]) -> Tensor:
    every = concatenated(tasks)
    return leading_products(*grams(every), every.s, [task.rank for task in tasks])


class _File:
    """The factors of one expert, on disk."""

    def __init__(self, opened: ExitStack, path: Path) -> None:
        try:
            self._file: Any = opened.enter_context(safe_open(path, "pt"))
        except (OSError, SafetensorError) as error:
            raise SourceError(f"cannot be read ({str(error)[:100]})", str(path), "make the bundle again") from None
        self._names = set(self._file.keys())

    def whole(self, name: str) -> Tensor:
        values: Tensor = self._file.get_tensor(whole_name(name))
        return values

    def leading(self, name: str, shape: Sequence[int]) -> Factors:
        u, s, vh = triplet_names(name)
        if u not in self._names:
            return Factors(torch.zeros(shape[0], 0), torch.zeros(0), torch.zeros(torch.Size(shape[1:]).numel(), 0))
        left, right = self._file.get_slice(u)[:, :_MOST], self._file.get_slice(vh)[:_MOST]
        return Factors(left.float(), self._file.get_tensor(s)[:_MOST].float(), right.float().mT)
