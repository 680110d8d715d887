"""A model as a table of named byte ranges: headers first, weights only when asked, slice by slice.

    SafetensorsSource(paths)                files of weights; `folder.open_model` finds those of a model
    MemorySource(tensors)                   a state dict, for research code and tests

Opening reads headers only. `read_bytes` fills a caller's buffer with a slice of one tensor, exactly as stored.
"""

import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergetool.errors import SourceError
from mergetool.tensors.dtypes import DType, of_torch, torch_dtype
from mergetool.tensors.foreign import disguised
from mergetool.tensors.header import Header, TensorSpec, header_length, is_storable_name, parse_header
from mergetool.tensors.io import bytes_of, read_error, read_exact

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.tensors.factors import Halves, KeptChange

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WEIGHT_NAMES = (INDEX_NAME, SINGLE_NAME, "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What mostly makes a folder a model, for people who look for it."""
_MAX_INDEX_BYTES = 200_000_000


@dataclass(frozen=True)
class FileStamp:
    """A file as it was when its header was read; `changed` tells whether it still is."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Raises SourceError where there is no plain file: pipes and devices could be read forever."""
        try:
            status = path.stat()
        except OSError as error:
            raise read_error(error, str(path)) from error
        if not stat.S_ISREG(status.st_mode):
            raise SourceError("is not a file", str(path), "get the model again")
        return cls(path, status.st_size, status.st_mtime_ns)

    @cached_property
    def place(self) -> str:
        """Where the path leads: asked for every tensor, and told by a look at every folder above it."""
        return str(self.path.resolve())

    def changed(self) -> bool:
        try:
            return FileStamp.of(self.path) != self
        except SourceError:
            return True


class ModelSource(ABC):
    """One model: `specs` says what it holds, `read_bytes` delivers slices of it."""

    specs: Mapping[str, TensorSpec]
    folder: Path | None
    """Where config and tokenizer files lie; None for a bare file or a state dict."""
    stem: str = "model"
    """What the library that opens this model calls its files: STEM.safetensors."""
    remarks: tuple[str, ...] = ()
    """What people should know of how it was read."""

    @property
    @abstractmethod
    def files(self) -> tuple[FileStamp, ...]:
        """The files that hold weights, in the order their tensors should be visited."""

    @abstractmethod
    def position(self, name: str) -> tuple[int, int]:
        """(index into `files`, byte offset): reading in this order is reading forwards."""

    @abstractmethod
    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with stored bytes of tensor `name`, from byte `begin` of the tensor. Thread-safe."""

    @property
    def described(self) -> Mapping[str, TensorSpec]:
        """The tensors as the folder's config.json describes them: without what adapters change."""
        return self.specs

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer lies whose tokens the rows of embeddings are."""
        return self.folder

    def stored_as(self, name: str) -> DType:
        """The dtype a copy of this tensor takes where the output keeps each tensor's own."""
        return self.specs[name].dtype

    @property
    def origin(self) -> "ModelSource":
        """The model that this one is with directions added (see `factors`); itself, where there is none."""
        return self

    def num_directions(self, name: str) -> int | None:
        """At most how many directions were added to the origin's tensor (0: it is that); None where it is another."""
        return None

    def factors(self, name: str) -> "Halves | None":
        """B (rows, r) and A (r, all else), float32: the origin's tensor plus B A is this one. None: not known so."""
        return None

    def kept(self, name: str) -> "KeptChange | None":
        """The change of the origin's tensor as a bundle keeps it, as stored; None: this is no expert of one."""
        return None

    def scale(self, name: str) -> float:
        """What `factors` has multiplied B by: alpha / r of an adapter, where there is one."""
        return 1.0

    def will_need(self, name: str, begin: int, length: int) -> None:  # noqa: B027  (optional: a hint)
        """Hint that bytes [begin, begin + length) of tensor `name` are wanted soon."""

    def close(self) -> None:  # noqa: B027  (optional: nothing to close in memory)
        """Release what is open. Reading again reopens it."""


def is_same_tensor(one: ModelSource, other: ModelSource, name: str) -> bool:
    """Whether two sources give a tensor as one and the same place of one file holds it."""
    if one is other:
        return True
    plain = one.origin is one and other.origin is other
    known = plain and name in one.specs and name in other.specs and bool(one.files) and bool(other.files)
    return known and one.specs[name] == other.specs[name] and _place(one, name) == _place(other, name)


def _place(source: ModelSource, name: str) -> tuple[str, int, int, int]:
    index, offset = source.position(name)
    stamp = source.files[index]
    return stamp.place, stamp.size, stamp.mtime_ns, offset


def read_whole(source: ModelSource, name: str) -> "Tensor":
    """A tensor as it is stored."""
    import torch

    spec = source.specs[name]
    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    source.read_bytes(name, 0, bytes_of(tensor.reshape(-1)))
    return tensor


@dataclass
class OpenFile:
    """One safetensors file with its checked header; the descriptor is opened on first read and then shared.

    The header may be known before the file is there (read from a distance): then it can be planned with, not read.
    """

    stamp: FileStamp
    header: Header

    @cached_property
    def fd(self) -> int:
        try:
            return os.open(self.stamp.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise read_error(error, str(self.stamp.path)) from error

    def close(self) -> None:
        if "fd" in self.__dict__:
            os.close(self.__dict__.pop("fd"))


NOTHING: Mapping[Path, OpenFile] = MappingProxyType({})


def read_header(path: Path) -> Header:
    """Read and check the header of one .safetensors file. Raises SourceError."""
    return _open(path).header


def _for_what_it_is(path: Path, error: SourceError) -> SourceError:
    other = disguised(path)
    return error if other is None else SourceError(f"{other.what} ({error.what})", other.where, other.fix)


def _open(path: Path) -> OpenFile:
    stamp = FileStamp.of(path)
    try:
        with path.open("rb") as file:
            data = file.read(header_length(file.read(8), stamp.size, str(path)))
        return OpenFile(stamp, parse_header(data, stamp.size, str(path)))
    except OSError as error:
        raise read_error(error, str(path)) from error
    except SourceError as error:
        raise _for_what_it_is(path, error) from None


class SafetensorsSource(ModelSource):
    """Tensors spread over one or several safetensors files."""

    def __init__(
        self,
        paths: list[Path],
        folder: Path | None,
        weight_map: Mapping[str, str] | None = None,
        elsewhere: Mapping[Path, OpenFile] = NOTHING,
    ) -> None:
        self._open_files = [elsewhere[path] if path in elsewhere else _open(path) for path in paths]
        self.folder = folder
        self._places: dict[str, int] = {}
        for index, file in enumerate(self._open_files):
            for name in file.header.slots:
                expected = weight_map.get(name) if weight_map is not None else file.stamp.path.name
                if expected == file.stamp.path.name:
                    self._places[name] = index
        check_complete(weight_map or {}, self._places, folder)
        self.specs = {name: self._open_files[i].header.slots[name].spec for name, i in self._places.items()}

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return tuple(file.stamp for file in self._open_files)

    @property
    def headers(self) -> tuple[Header, ...]:
        """The checked headers, in the order of `files`."""
        return tuple(file.header for file in self._open_files)

    def position(self, name: str) -> tuple[int, int]:
        index = self._places[name]
        return index, self._open_files[index].header.slots[name].begin

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        index, offset = self.position(name)
        file = self._open_files[index]
        read_exact(file.fd, buffer, offset + begin, f"{file.stamp.path}: {name}")

    def will_need(self, name: str, begin: int, length: int) -> None:
        index, offset = self.position(name)
        fd = self._open_files[index].fd
        with suppress(OSError):  # a hint; some file systems take none
            os.posix_fadvise(fd, offset + begin, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for file in self._open_files:
            file.close()


def check_complete(weight_map: Mapping[str, str], held: Collection[str], folder: Path | None) -> None:
    """Raises SourceError where an index speaks of a tensor that its file does not hold."""
    for name, file in weight_map.items():
        if name not in held:
            raise SourceError(
                f"the index says {file} holds tensor {name!r}, but it does not",
                str(folder),
                "the folder is incomplete or its index is stale; download or save the model again",
            )


class MemorySource(ModelSource):
    """A state dict that is already in memory. Tensors are viewed, never copied or changed."""

    folder = None

    def __init__(self, tensors: Mapping[str, "Tensor"], where: str = "in memory") -> None:
        self._tensors = dict(tensors)
        self._where = where
        self.specs = {name: self._spec(name, tensor) for name, tensor in tensors.items()}
        self._order = {name: index for index, name in enumerate(tensors)}

    def _spec(self, name: str, tensor: "Tensor") -> TensorSpec:
        if not is_storable_name(name):
            raise SourceError(f"no tensor can be stored under the name {ascii(name)[:100]}", self._where, "rename it")
        try:
            return TensorSpec(name, of_torch(tensor.dtype), tuple(tensor.shape))
        except KeyError:
            raise SourceError(
                f"dtype {tensor.dtype} cannot be stored", f"{self._where}: {name}", "convert the tensor first"
            ) from None

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return ()

    def position(self, name: str) -> tuple[int, int]:
        return 0, self._order[name]

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        import torch

        tensor = self._tensors[name].detach()
        if not tensor.is_contiguous():  # a view such as W.T: lay it out once, then slices of it are free
            tensor = self._tensors[name] = tensor.contiguous()
        stored = tensor.reshape(-1).view(torch.uint8)[begin : begin + len(buffer)]
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(stored)


def weight_map(folder: Path, index_name: str) -> dict[str, str]:
    """An index's tensor -> file map; refuses files outside the folder."""
    path = folder / index_name
    fix = "the index is damaged; download or save the model again"
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise SourceError(f"the index is larger than {_MAX_INDEX_BYTES} bytes", str(path), fix)
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        if (other := disguised(path)) is not None:
            raise other from None
        raise SourceError(f"the index is not valid JSON ({str(error)[:100]})", str(path), fix) from None
    except OSError as error:
        raise read_error(error, str(path)) from error
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise SourceError("the index has no weight_map of tensor names to files", str(path), fix)
    for name, file in places.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise SourceError(
                f"weight_map sends {name!r} to {file!r}, which is not a file of this folder",
                str(path),
                "an index may only name files that lie beside it; get the model from a source you trust",
            )
    return places
