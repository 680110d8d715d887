"""Rows of tokens that a model lacks, made of tokens that it shares with a donor.

The donor's row of a token is written as a sum of few of the donor's rows of shared tokens; the same sum of the model's
own rows of these tokens is the model's new row. So only what tokens have to do with each other is taken over.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mergetool.checkpoints.gathered import read_rows
from mergetool.checkpoints.ties import embeddings_of, is_head
from mergetool.checkpoints.token_rows import DONATED, Numbers, RowMap
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

_ATOMS = 64
"""Shared tokens that a row is made of, at most."""
_BLOCK = 64
"""New rows that are made at a time: always the same ones together, so that the same bits come out."""
_KEPT = 8
"""Blocks that are kept for those who ask next."""


class Donor:
    """Makes rows for one model. Called with a tensor's name and numbers of rows, in the donor's vocabulary."""

    def __init__(self, donor: ModelSource, model: ModelSource, maps: Mapping[str, RowMap]) -> None:
        self._donor, self._model, self._maps = donor, model, maps
        self._atoms: dict[str, tuple[Tensor, Numbers]] = {}
        self._blocks: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, name: str, numbers: Numbers) -> "Tensor":
        import torch

        made = np.flatnonzero(self._maps[name].source == DONATED)
        places = np.searchsorted(made, numbers)
        blocks = {int(each): self._block(name, int(each), made) for each in np.unique(places // _BLOCK)}
        return torch.stack([blocks[int(place) // _BLOCK][int(place) % _BLOCK] for place in places])

    def _block(self, name: str, index: int, made: Numbers) -> "Tensor":
        key = (name, index)
        with self._lock:
            if key in self._blocks:
                return self._blocks[key]
        block = self._made(name, made[index * _BLOCK : (index + 1) * _BLOCK])
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        return block

    def _made(self, name: str, numbers: Numbers) -> "Tensor":
        import torch

        from mergetool.kernels.pursuit import pursue

        atoms, own = self._shared(name)
        theirs = donor_tensor(name, self._donor)
        assert theirs is not None
        here = numbers < self._donor.specs[theirs].shape[0]  # a token beyond the donor's rows has none: zeros
        width = self._model.specs[name].shape[1]
        made = torch.zeros(len(numbers), width, dtype=torch.float64)
        if not here.any() or not len(own):
            return made
        chosen, shares = pursue(read_rows(self._donor, theirs, numbers[here]).double(), atoms, _ATOMS)
        rows = read_rows(self._model, name, own[chosen.numpy().reshape(-1)]).double().view(*chosen.shape, width)
        made[torch.from_numpy(here)] = (shares[:, None, :] @ rows).squeeze(1)
        return made

    def _shared(self, name: str) -> "tuple[Tensor, Numbers]":
        """The donor's rows of shared tokens, and the numbers of the model's rows of these: read once."""
        with self._lock:
            if name not in self._atoms:
                rows, theirs = self._maps[name], donor_tensor(name, self._donor)
                assert theirs is not None
                shared = np.flatnonzero(rows.source[: rows.num_tokens] == rows.own)
                shared = shared[shared < self._donor.specs[theirs].shape[0]]
                self._atoms[name] = read_rows(self._donor, theirs, shared).float(), rows.row[shared]
            return self._atoms[name]


def donor_tensor(name: str, donor: ModelSource) -> str | None:
    """The donor's tensor of the same kind: its head for a head (its embeddings, where those are its head)."""
    matrices = [other for other, spec in donor.specs.items() if len(spec.shape) == 2]
    if name in matrices:
        return name
    embeddings = embeddings_of(matrices)
    heads = [other for other in matrices if is_head(other)] if is_head(name) else []
    return next(iter([*heads, *embeddings]), None)


def memory_of(donor: ModelSource, names: Mapping[str, int]) -> int:
    """Bytes that the donor's rows of shared tokens take, `names` telling how many they are for each tensor."""
    tensors = ((donor_tensor(name, donor), count) for name, count in names.items())
    return sum(4 * count * donor.specs[theirs].shape[1] for theirs, count in tensors if theirs is not None)
