"""Files that may not grow beyond a size, as on a disk that is full."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def limit_files(size: int) -> None:
    """Files may not grow beyond `size` bytes from now on, in this process and its children."""
    sys.dont_write_bytecode = True  # Python cuts the code that it keeps of a module at the limit, and says nothing
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


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
