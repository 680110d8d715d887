"""Files that may not grow beyond a size, as on a disk that is full."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    limits, kept = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # see below
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = kept


def without_code() -> dict[str, str]:
    """For a process under a limit: Python cuts the code that it keeps of a module at the limit, and says nothing."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
