"""What is found on the way through a network: in memory, or in files of a folder that outlives a kill.

Of a network that is measured layer by layer everything that the next layers need is in files when a layer is done, and
then the index names them; so whoever opens the folder after a kill goes on with the next layer.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from mergetool.errors import OutputError
from mergetool.tensors.io import bytes_of, write_error
from mergetool.tensors.temporary import folder_of, locked
from mergetool.tensors.writer import write_file

_INDEX = "index.json"
_PLAIN = (Tensor, str, bool, int, float, type(None))


class KeptInMemory(dict[str, Tensor]):
    """Tensors in memory, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[str, str] = {}
        """Names of which the tensor is another one's, with that one's."""

    def gather(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Keep a tensor that comes some rows after the other."""
        self[name] = torch.cat([piece.cpu() for piece in pieces])


class KeptInFiles(MutableMapping[str, Tensor]):
    """Tensors by name, each in a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.known: dict[str, tuple[str, list[int], str]] = {}
        """Of each the file, the shape and the dtype."""
        self.shared: dict[str, str] = {}

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.gather(name, [value])

    def gather(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Keep a tensor that comes some rows after the other."""
        file_name = self.known[name][0] if name in self.known else f"tensor-{len(self.known)}"
        path, rows = self._folder / file_name, 0
        try:
            with path.open("wb") as file:
                for piece in pieces:
                    file.write(bytes_of(piece.detach().cpu().contiguous().reshape(-1)))
                    rows += len(piece) if piece.dim() else 0
                _sync(file)
        except OSError as error:
            raise _refused(error, path) from error
        shape = [rows, *piece.shape[1:]] if piece.dim() else []
        self.known[name] = path.name, shape, str(piece.dtype).removeprefix("torch.")

    def __getitem__(self, name: str) -> Tensor:
        file, shape, dtype = self.known[name]
        size = torch.Size(shape)
        kind = getattr(torch, dtype)
        return torch.from_file(str(self._folder / file), shared=False, size=size.numel(), dtype=kind).view(size)

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


Keeping = KeptInMemory | KeptInFiles


class Unfinished:
    """What is done of a network, in a folder. It goes when all is done or something is wrong, and stays after a kill.

    Where another process works in that folder, in one of its own, which goes in any case.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OutputError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(folder)
            self._folder = folder if self._lock is not None else folder_of(self, folder.parent)
        except OSError as error:
            raise _refused(error, folder) from error
        self.tensors = KeptInFiles(self._folder)
        self._done: list[str] = []
        self._values: dict[str, str] = {}
        self._unwritten: dict[str, Any] = {}
        """What no file can hold; then nobody can go on here."""
        if (index := self._folder / _INDEX).exists():
            told = json.loads(index.read_text())
            self._done, self._values = told["done"], told["values"]
            self.tensors.known |= {name: tuple(each) for name, each in told["tensors"].items()}
            self.tensors.shared |= told["shared"]

    def is_done(self, step: str) -> bool:
        return step in self._done

    def done(self, step: str, values: Mapping[str, Any], over: Sequence[str] = ()) -> None:
        """A step is done. From now on these values are there (tensors in lists and the like), and those of `over` gone.

        Raises OutputError.
        """
        for name in over:
            self._values.pop(name, None)
        for name, value in values.items():
            self._write(name, value, f"{name}-{step}")
        self._done.append(step)
        if self._unwritten:
            return
        known = {"tensors": self.tensors.known, "shared": self.tensors.shared}
        write_file(self._folder / _INDEX, json.dumps({"done": self._done, "values": self._values, **known}))
        for path in self._folder.glob("value-*"):
            if path.name not in self._values.values():
                path.unlink()

    def _write(self, name: str, value: Any, number: str) -> None:
        leaves, form = tree_flatten(value)
        try:
            told = treespec_dumps(form)
        except NotImplementedError:
            told = ""
        if not told or not all(isinstance(each, _PLAIN) for each in leaves):
            self._unwritten[name] = value
            return
        self._values[name] = f"value-{number}"
        path = self._folder / self._values[name]
        try:
            with path.open("wb") as file:
                torch.save((told, leaves), file)
                _sync(file)
        except OSError as error:
            raise _refused(error, path) from error

    def value(self, name: str) -> Any:
        """A value as it was given last."""
        if name in self._unwritten:
            return self._unwritten[name]
        form, leaves = torch.load(self._folder / self._values[name], mmap=True, weights_only=True)
        return tree_unflatten(leaves, treespec_loads(form))

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is None:
            return
        if kind is None or issubclass(kind, Exception):
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _refused(error: OSError, path: Path) -> OutputError:
    told = write_error(error, str(path))
    return OutputError(told.what, told.where, "free some space, or choose another place with --cache DIR")
