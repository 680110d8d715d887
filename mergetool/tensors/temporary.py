"""Temporary folders that go with their owner. Those of programs that were killed go when the next is made.

Each is locked by its program for as long as that lives: what nobody has locked, nobody uses.
"""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

_PREFIX = "mergetool-planned-"
_NEW = 60.0
"""Seconds in which a folder may be there and not be locked yet."""


def folder_of(owner: object, place: Path | None = None) -> Path:
    """A new, empty folder that is removed with its owner; in a folder, or where the system has its temporary ones."""
    inside = place or Path(tempfile.gettempdir())
    inside.mkdir(parents=True, exist_ok=True)
    _sweep(inside)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=inside))
    weakref.finalize(owner, _remove, folder, locked(folder), os.getpid())
    return folder


def _sweep(inside: Path) -> None:
    """Remove what killed programs of this user have left."""
    for folder in inside.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            old = status.st_uid == os.getuid() and status.st_mtime < time.time() - _NEW
            if old and (lock := locked(folder)) is not None:
                _remove(folder, lock, os.getpid())


def locked(folder: Path) -> int | None:
    """A file descriptor that holds the folder's lock; None where another program has it, or there are no locks."""
    lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove(folder: Path, lock: int | None, process: int) -> None:
    """Remove a folder, but not from a fork of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
