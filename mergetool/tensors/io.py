"""Reading and writing exact byte ranges, however the kernel cuts them up.

One `pread` or `pwrite` moves at most 2 147 479 552 bytes on Linux and may always move fewer: every call here loops
until the whole range is done, and says which file and range failed when it cannot be.
"""

import errno
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import OutputError, SourceError

if TYPE_CHECKING:
    from torch import Tensor

_HASH_BLOCK = 1 << 20


def read_exact(fd: int, buffer: memoryview, offset: int, where: str) -> None:
    """Fill `buffer` (bytes) from `offset` of `fd`. Raises SourceError when the file ends early or cannot be read."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise read_error(error, where) from error
        if count == 0:
            raise SourceError(
                f"the file ends at byte {offset + done}, {len(buffer) - done} bytes before the tensor does",
                where,
                "the file changed or is truncated; download or save it again",
            )
        done += count


def write_exact(fd: int, data: memoryview, offset: int, where: str) -> None:
    """Write all of `data` (bytes) at `offset` of `fd`. Raises OutputError (no space, no permission, ...)."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            raise write_error(error, where) from error


def read_error(error: OSError, where: str) -> SourceError:
    """The SourceError for an operating-system error met while opening or reading."""
    return SourceError(f"cannot be read: {error.strerror or error}", where, "check the path, its permissions, the disk")


def write_error(error: OSError, where: str) -> OutputError:
    """The OutputError for an operating-system error met while writing."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError("no space left on the disk", where, "free some space, or choose another place with -o PATH")
    if error.errno == errno.EFBIG:
        fix = "set a smaller output.shard_size (of an adapter a smaller output.rank), or choose another place: -o PATH"
        return OutputError("the file would be larger than this system allows", where, fix)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputError(f"cannot be written: {error.strerror}", where, "choose another place with -o PATH")
    return OutputError(f"cannot be written: {error.strerror or error}", where, "choose another place with -o PATH")


def bytes_of(tensor: "Tensor") -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes. No copy."""
    import torch

    flat = tensor if tensor.dim() == 1 else tensor.view(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(array)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file, read in order. Raises SourceError when it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise read_error(error, str(path)) from error
    return digest.hexdigest()


def hash_range(path: Path, digest: "hashlib._Hash", begin: int, end: int) -> None:
    """Feed bytes [begin, end) of a file to `digest`. Raises SourceError when they cannot be read."""
    buffer = memoryview(bytearray(_HASH_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            for offset in range(begin, end, len(buffer)):
                part = buffer[: min(len(buffer), end - offset)]
                read_exact(file.fileno(), part, offset, str(path))
                digest.update(part)
    except OSError as error:
        raise read_error(error, str(path)) from error
