"""Factors of task vectors, computed once and kept under the hash of what they are factors of.

A task vector's key is the SHA-256 of its shape, dtype and bytes, so whatever needs its factors again (another scale,
another subset of tasks, a library, a routed bundle, a run that was killed) finds them. Leading triplets do not depend
on how many were asked for: a file made at a higher rank serves every lower one.
"""

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergetool.errors import OutputError
from mergetool.kernels.spectral import Factors, live_factors
from mergetool.tensors.io import bytes_of, write_error
from mergetool.tensors.writer import write_tensors

Place = tuple[str, str]
"""A model, and a tensor of it."""

_VERSION = "live-factors-2"
"""Changes when the same task vector would get other factors."""


class FactorStore:
    """Factors on disk. Safe for several threads and processes: files appear whole, by a rename."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys: dict[Place, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, str(folder)) from error

    def factors(self, delta: Tensor, k: int, place: Place | None = None) -> Factors:
        """The at most k leading live triplets of `delta` (m, n), float32 or float64; in float64.

        Stored as they were computed: the polar factor of nearly dependent directions needs all their digits. `place`:
        where `delta` is from, by which they are found again (`known`) without it.

        Raises ValueError if k is not in 1..min(m, n), or `delta` is not finite.
        """
        key = self.key(delta)
        path = self._path(key)
        if place is not None:
            self._keys[place] = key
        if (stored := _load(path, k)) is not None:
            return Factors(*(part.to(delta.device) for part in (stored.u, stored.s, stored.v)))
        factors = live_factors(delta, k)
        self._save(path, factors, k)
        return factors

    def known(self, place: Place, k: int) -> Factors | None:
        """What `factors` has found there, if this process has asked for as many."""
        key = self._keys.get(place)
        return None if key is None else _load(self._path(key), k)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    @staticmethod
    def key(delta: Tensor) -> str:
        """SHA-256 that names a task vector's file."""
        digest = hashlib.sha256(f"{_VERSION} {delta.dtype} {tuple(delta.shape)}".encode())
        digest.update(bytes_of(delta.cpu().contiguous().reshape(-1)))
        return digest.hexdigest()

    def _save(self, path: Path, factors: Factors, k: int) -> None:
        sibling = path.with_name(f".{path.name}.{os.getpid()}.{id(factors)}")
        parts = {"u": factors.u, "s": factors.s, "v": factors.v}
        try:
            write_tensors(sibling, parts, {"k": str(k)})
            sibling.replace(path)
        except (OSError, OutputError) as error:
            sibling.unlink(missing_ok=True)
            raise error if isinstance(error, OutputError) else write_error(error, str(path)) from error


def _load(path: Path, k: int) -> Factors | None:
    """Stored factors of rank k, or None where there are none, or ones of a lower rank."""
    try:
        with safe_open(path, framework="pt") as file:
            if int((file.metadata() or {}).get("k", 0)) < k:
                return None
            return Factors(*(file.get_tensor(name) for name in "usv")).leading(k)
    except (OSError, SafetensorError):  # not there, or damaged: it is only a cache
        return None
