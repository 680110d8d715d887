"""Merged tensors between a count over the whole model and the merge that follows, in files of a temporary folder.

Only a cache: what is not there (little room, another process, a killed run) is computed again.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from mergetool.methods.group import Note, Shelf
from mergetool.tensors.temporary import folder_of

_SPARE = 4
"""How many times what is kept must be free on the disk."""


class Shelves:
    """A place for every step of a run. Safe for several threads."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock = Lock()
        self.notes: dict[int, list[Note]] = {}
        """Of what is kept, by step."""

    def of(self, index: int) -> Shelf:
        """The place of one step."""
        return _Place(self, index)

    def path(self, index: int) -> Path:
        """Where a step's tensor is kept."""
        with self._lock:
            if self._folder is None:
                self._folder = folder_of(self)
        return self._folder / str(index)


class _Place(Shelf):
    def __init__(self, shelves: Shelves, index: int) -> None:
        self._shelves, self._index = shelves, index

    def put(self, tensor: Tensor, notes: Sequence[Note]) -> None:
        path = self._shelves.path(self._index)
        if shutil.disk_usage(path.parent).free < _SPARE * tensor.nbytes:
            return
        with suppress(OSError):
            np.save(path.with_suffix(".npy"), tensor.cpu().numpy())
            self._shelves.notes[self._index] = list(notes)

    def take(self) -> tuple[Tensor, Sequence[Note]] | None:
        notes = self._shelves.notes.pop(self._index, None)
        if notes is None:
            return None
        path = self._shelves.path(self._index).with_suffix(".npy")
        try:
            return torch.from_numpy(np.load(path)), notes
        except (OSError, ValueError):
            return None
        finally:
            path.unlink(missing_ok=True)
