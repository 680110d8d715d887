"""SHA-256 of an output file while it is being filled.

Units are finished in any order, by several threads, but roughly from front to back. The digest follows the first gap,
so that little is left to hash when the last unit is written; otherwise every run would end in one thread that reads
the whole file again.
"""

import hashlib
from pathlib import Path

from mergetool.tensors.io import hash_range

_STEP = 64 << 20
"""Bytes that are worth a job of their own."""


class IncrementalHash:
    """What of one file is finished without a gap from its first byte on, and how much of that is hashed."""

    def __init__(self, path: Path, size: int, begin: int) -> None:
        """A file of `size` bytes whose first `begin` bytes (its header) are written."""
        self._path = path
        self._size = size
        self._written = begin
        self._ends: dict[int, int] = {}
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._busy = False

    def add(self, begin: int, end: int) -> None:
        """Bytes [begin, end) are written. Every byte is added once."""
        if begin < end:
            self._ends[begin] = end
        while self._written in self._ends:
            self._written = self._ends.pop(self._written)

    @property
    def complete(self) -> bool:
        """Whether every byte is written."""
        return self._written == self._size

    def take(self) -> bool:
        """Whether to hash now; if so, nobody else may until `hash` is done."""
        waiting = self._written - self._hashed
        if self._busy or not waiting or (waiting < _STEP and not self.complete):
            return False
        self._busy = True
        return True

    def hash(self) -> str | None:
        """Hash what is finished. Returns the file's SHA-256 in hex if that is all of it."""
        end = self._written
        hash_range(self._path, self._digest, self._hashed, end)
        self._hashed = end
        self._busy = False
        return self._digest.hexdigest() if end == self._size else None
