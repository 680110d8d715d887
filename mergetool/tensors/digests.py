"""SHA-256 of input files, remembered between runs.

Hashing costs more than most merges, and sweeps merge the same models again and again. A digest is remembered for a
file as it was: path, device, inode, size, and the times of its last change to content and to status, of which no
program can set the last. A file that changed in the two seconds before it was hashed could change again without its
times telling, so it is not remembered. `mergetool verify` never relies on what is remembered.

The memory is `digests.jsonl` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`, then `mergetool`): one
line appended for each file, so that several runs can write at once; a line that cannot be read counts for nothing.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mergetool.tensors.io import read_error, sha256_file

_SMALLEST = 16 << 20
"""Bytes below which hashing is quick enough."""
_UNSETTLED_NS = 2_000_000_000
_LARGEST_MEMORY = 4 << 20
"""Bytes of the memory beyond which it starts anew."""


def cache_folder() -> Path:
    """The user's cache folder for mergetool. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergetool"


class _Identity(NamedTuple):
    """What says that a file is still the one that was hashed."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> "_Identity":
        try:
            s = path.stat()
            return cls(str(path.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        except OSError as error:
            raise read_error(error, str(path)) from error


def remembered_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, found now or when the file last was as it is. Raises SourceError if it is unreadable."""
    identity = _Identity.of(path)
    if identity.size < _SMALLEST:
        return sha256_file(path)
    if known := _recall(identity):
        return known
    now = time.time_ns()
    digest = sha256_file(path)
    if max(identity.mtime_ns, identity.ctime_ns) + _UNSETTLED_NS < now and _Identity.of(path) == identity:
        _remember(identity, digest)
    return digest


def _recall(identity: _Identity) -> str | None:
    with suppress(OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: a user without a home
        for line in _memory().read_text("utf-8").splitlines():
            with suppress(ValueError, TypeError):
                *known, digest = json.loads(line)
                if known == list(identity) and len(bytes.fromhex(digest)) == 32:
                    return str(digest)
    return None


def _remember(identity: _Identity, digest: str) -> None:
    with suppress(OSError, RuntimeError):  # what cannot be remembered is hashed again
        memory = _memory()
        memory.parent.mkdir(parents=True, exist_ok=True)
        if memory.exists() and memory.stat().st_size > _LARGEST_MEMORY:
            memory.unlink()
        with memory.open("ab", buffering=0) as file:
            file.write(f"{json.dumps([*identity, digest])}\n".encode())


def _memory() -> Path:
    return cache_folder() / "digests.jsonl"
