"""Output files as rows of numbered slots: created at their final size with their final header, filled in any order.

Everything is written into a folder called `NAME.partial`, which is renamed once, at the very end: `NAME` is complete
or does not exist. Space is reserved when a file is created, so a disk that is too small says so before any work.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mergetool.errors import OutputError
from mergetool.tensors.dtypes import of_torch
from mergetool.tensors.header import Header, TensorSpec, lay_out
from mergetool.tensors.io import bytes_of, write_error, write_exact
from mergetool.tensors.source import SafetensorsSource

if TYPE_CHECKING:
    from torch import Tensor


Content = str | bytes | Iterator[bytes]
"""What is written to a small file, or to one that is made piece by piece."""


class FileLayout(Protocol):
    """What a writer needs to know of one output file."""

    @property
    def name(self) -> str: ...
    @property
    def prefix(self) -> bytes: ...
    @property
    def header(self) -> Header: ...
    @property
    def sparse(self) -> bool: ...


def partial_path(output: Path) -> Path:
    """Where an unfinished output lies."""
    return output.parent / f"{output.name}.partial"


def parts_path(output: Path) -> Path:
    """Where the results of recipes inside the one that makes an output lie until it is there."""
    return output.parent / f"{output.name}.partial.parts"


class SlotWriter:
    """The output files of one run. `write` may be called from any thread, for any slots, in any order."""

    def __init__(self, folder: Path, layouts: Sequence[FileLayout]) -> None:
        self.folder = folder
        self._layouts = layouts
        self._fds: list[int] = []
        try:
            for layout in layouts:
                self._create(layout)
        except OutputError:
            self.close()
            raise

    def _create(self, layout: FileLayout) -> None:
        path = self.folder / layout.name
        size = layout.header.file_size
        if path.parent != self.folder:  # one result of several
            make_folder(path.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._fds.append(fd)
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size) if layout.sparse else _reserve(fd, size)
        except OSError as error:
            raise write_error(error, str(path)) from error
        write_exact(fd, memoryview(layout.prefix), 0, str(path))

    def write(self, shard: int, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name` in file `shard`. Raises OutputError."""
        layout = self._layouts[shard]
        slot = layout.header.slots[name]
        assert begin + len(data) <= slot.spec.num_bytes, f"{name}: {len(data)} bytes at {begin} leave the slot"
        write_exact(self._fds[shard], data, slot.begin + begin, f"{self.folder / layout.name}: {name}")

    @property
    def num_files(self) -> int:
        return len(self._fds)

    def path(self, shard: int) -> Path:
        """The unfinished file."""
        return self.folder / self._layouts[shard].name

    def sync(self, shard: int | None = None) -> None:
        """Wait until everything written to a file (or to all) is on the disk. Raises OutputError."""
        for index in range(self.num_files) if shard is None else (shard,):
            try:
                os.fdatasync(self._fds[index])
            except OSError as error:
                raise write_error(error, str(self.path(index))) from error

    def source(self) -> SafetensorsSource:
        """What was written, for reading."""
        return SafetensorsSource([self.path(index) for index in range(self.num_files)], None)

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _reserve(fd: int, size: int) -> None:
    """Give the file its final size, with real space behind it where the file system can promise any."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        free = os.fstatvfs(fd)
        if free.f_bavail * free.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        os.ftruncate(fd, size)


def write_file(path: Path, text: Content) -> None:
    """Write a small file whole or not at all: to a sibling, synced, then renamed. Raises OutputError."""
    sibling = path.with_name(f".{path.name}.tmp")
    try:
        with sibling.open("wb") as file:  # names of files in a text may be no Unicode
            whole = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
            file.writelines([whole] if isinstance(whole, bytes | bytearray) else whole)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    except OSError as error:
        with suppress(OSError):
            sibling.unlink(missing_ok=True)
        raise write_error(error, str(path)) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, where there is none. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write a small safetensors file, and wait until it is on the disk. Raises OutputError.

    The bytes are those of safetensors' own `save_file`, which lets nobody but the owner read them whatever the umask.
    """
    specs = [TensorSpec(name, of_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    prefix, header = lay_out(specs, metadata or {})
    try:
        with path.open("wb") as file:
            file.write(prefix)
            for name in header.slots:
                file.write(bytes_of(tensors[name].detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(error, str(path)) from error


def copy_file(source: Path, path: Path) -> None:
    """Copy a small file, and wait until it is on the disk. Raises OutputError."""
    try:
        shutil.copyfile(source, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(error, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"cannot be opened: {error.strerror}", str(folder), "check its permissions") from error
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
