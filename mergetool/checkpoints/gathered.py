"""A model that shows its embeddings and heads under another vocabulary: rows are gathered when they are read.

Where every row lies in a file as it is, bytes are copied, runs of rows at once and in file order. Where rows are means,
or come from files of several dtypes, the tensor is float32 (or float64), as changes by adapters are.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergetool.checkpoints.token_rows import MEAN, MIXED, PADDING, ZERO, Numbers, RowMap
from mergetool.tensors.dtypes import BY_NAME, DType, torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import FileStamp, ModelSource

if TYPE_CHECKING:
    from torch import Tensor, dtype

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Donated = Callable[[str, Numbers], "Tensor"]
"""Rows that only a donor has, by tensor and numbers, in float64."""
_DOUBLE = 8

_GAP = 1 << 15
"""Bytes between two rows that are rather read than skipped."""
_CHUNK = 1 << 20
"""Bytes of rows that are gathered at a time."""


class GatheredModel(ModelSource):
    """`model` with the tensors that are keys of `maps` gathered from itself and others."""

    def __init__(
        self,
        model: ModelSource,
        maps: Mapping[str, RowMap],
        sources: Mapping[str, ModelSource],
        donated: Donated | None = None,
    ) -> None:
        self.model, self.maps = model, maps
        self.folder, self.stem, self.remarks = model.folder, model.stem, model.remarks
        self._sources, self._donated = sources, donated
        self._means: dict[tuple[str, int], Tensor] = {}
        self._lock = threading.RLock()
        self._exact = {name: self._dtype_if_exact(name) for name in maps}
        self.specs: Mapping[str, TensorSpec] = dict(model.specs) | {name: self._spec(name) for name in maps}

    # ------------------------------------------------------------------ a model

    @property
    def described(self) -> Mapping[str, TensorSpec]:
        return self.model.described

    @property
    def tokenizer_folder(self) -> Path | None:
        return self.model.tokenizer_folder

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self.model.files

    def position(self, name: str) -> tuple[int, int]:
        return self.model.position(name)

    def stored_as(self, name: str) -> DType:
        return self.model.stored_as(name)

    def will_need(self, name: str, begin: int, length: int) -> None:
        if name not in self.maps:
            self.model.will_need(name, begin, length)

    def close(self) -> None:
        self.model.close()

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if name not in self.maps:
            self.model.read_bytes(name, begin, buffer)
            return
        width = self._width(name) * self.specs[name].dtype.bits // 8
        for start, stop in _chunks(begin, begin + len(buffer), width):
            data = self._bytes(name, start, stop, width)
            first = max(begin, start * width)
            last = min(begin + len(buffer), stop * width)
            buffer[first - begin : last - begin] = data[first - start * width : last - start * width]

    # ------------------------------------------------------------------ rows

    def _bytes(self, name: str, start: int, stop: int, width: int) -> memoryview:
        """Rows [start, stop) as they are stored."""
        if self._exact[name] is None:
            made = self._made(name, start, stop, torch_dtype(self.specs[name].dtype))
            return bytes_of(made)
        rows = self.maps[name]
        gathered = np.zeros((stop - start, width), np.uint8)
        for place in np.unique(rows.source[start:stop]):
            if place >= 0:
                wanted = np.flatnonzero(rows.source[start:stop] == place)
                source = self._sources[rows.sources[place]]
                _gather(source, name, rows.row[start:stop][wanted], gathered, wanted)
        return gathered.reshape(-1).data

    def _made(self, name: str, start: int, stop: int, dtype: "dtype", without: int | None = None) -> "Tensor":
        """Rows [start, stop), computed; those of the kind `without` are zeros."""
        import torch

        rows = self.maps[name]
        made = torch.zeros(stop - start, self._width(name), dtype=dtype)
        for place in np.unique(rows.source[start:stop]):
            wanted = np.flatnonzero(rows.source[start:stop] == place)
            if place >= 0:
                values = self._values(rows.sources[place], name, rows.row[start:stop][wanted])
            elif place not in (ZERO, without):
                values = self._computed(name, start + wanted, int(place))
            else:
                continue
            made[torch.from_numpy(wanted)] = values.to(dtype)
        return made

    def _computed(self, name: str, numbers: Numbers, kind: int) -> "Tensor":
        """Rows that lie nowhere, in float64."""
        if kind == MIXED:
            return self._mixed(name, numbers)
        if kind in (MEAN, PADDING):
            return self._mean(name, kind).expand(len(numbers), -1)
        assert self._donated is not None
        return self._donated(name, numbers)

    def _mixed(self, name: str, numbers: Numbers) -> "Tensor":
        """Means of some rows, added in the order of their models."""
        import torch

        rows = self.maps[name]
        total = torch.zeros(len(numbers), self._width(name), dtype=torch.float64)
        parts = [(index, *part) for index, number in enumerate(numbers) for part in rows.mixed[int(number)]]
        for place in sorted({place for _, place, _ in parts}):
            mine = np.array([(index, row) for index, where, row in parts if where == place], np.int64)
            values = self._values(rows.sources[place], name, mine[:, 1])
            total.index_add_(0, torch.from_numpy(mine[:, 0].copy()), values.double())
        counts = torch.tensor([len(rows.mixed[int(number)]) for number in numbers], dtype=torch.float64)
        return total / counts[:, None]

    def _mean(self, name: str, kind: int) -> "Tensor":
        """The mean of the model's own rows, or of those that it shows for tokens, in float64: found out once."""
        with self._lock:
            if (name, kind) not in self._means:
                self._means[name, kind] = self._mean_of_own(name) if kind == MEAN else self._mean_of_shown(name)
            return self._means[name, kind]

    def _mean_of_own(self, name: str) -> "Tensor":
        spec = self.model.specs[name]
        rows, width = spec.shape[vocabulary_axis(spec.shape)], _DOUBLE * self._width(name)
        chunks = _chunks(0, rows * width, width)
        parts = (read_rows(self.model, name, np.arange(*each)).double().sum(0) for each in chunks)
        return sum(parts) / max(1, rows)  # type: ignore[return-value]

    def _mean_of_shown(self, name: str) -> "Tensor":
        import torch

        rows = self.maps[name]
        end, width = min(rows.num_tokens, len(rows.source)), _DOUBLE * self._width(name)
        chunks = _chunks(0, end * width, width)
        parts = (self._made(name, *each, torch.float64, without=PADDING).sum(0) for each in chunks)
        return sum(parts) / max(1, int((rows.source[:end] != PADDING).sum()))  # type: ignore[return-value]

    def _values(self, model: str, name: str, rows: Numbers) -> "Tensor":
        return read_rows(self._sources[model], name, rows)

    # ------------------------------------------------------------------ shapes

    def _width(self, name: str) -> int:
        """Elements of one row."""
        spec = self.model.specs[name]
        return spec.num_elements // max(1, spec.shape[vocabulary_axis(spec.shape)])

    def _dtype_if_exact(self, name: str) -> DType | None:
        """The one dtype that all rows are stored in, where none is computed."""
        rows = self.maps[name]
        dtypes = {self._sources[rows.sources[place]].specs[name].dtype for place in rows.used()}
        return dtypes.pop() if len(dtypes) == 1 and not rows.made else None

    def _spec(self, name: str) -> TensorSpec:
        spec, rows = self.model.specs[name], self.maps[name]
        dtypes = {self._sources[rows.sources[place]].specs[name].dtype.name for place in rows.used()}
        dtype = self._exact[name] or BY_NAME["F64" if "F64" in dtypes else "F32"]
        axis = vocabulary_axis(spec.shape)
        return TensorSpec(name, dtype, (*spec.shape[:axis], len(rows.source), *spec.shape[axis + 1 :]))


def read_rows(source: ModelSource, name: str, rows: Numbers) -> "Tensor":
    """Some rows of a tensor as numbers, in its own dtype."""
    import torch

    spec = source.specs[name]
    width = spec.num_bytes // max(1, spec.shape[vocabulary_axis(spec.shape)])
    gathered = np.empty((len(rows), width), np.uint8)
    _gather(source, name, rows, gathered, np.arange(len(rows)))
    return torch.from_numpy(gathered).view(torch_dtype(spec.dtype))


def vocabulary_axis(shape: tuple[int, ...]) -> int:
    """The axis with one entry a token: the first one, or the only one that is long."""
    return 1 if len(shape) == 2 and shape[0] == 1 else 0


def _chunks(begin: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) that hold bytes [begin, end), some at a time."""
    length = max(1, _CHUNK // width)
    last = -(-end // width)
    for start in range(begin // width, last, length):
        yield start, min(start + length, last)


def _gather(
    source: ModelSource,
    name: str,
    rows: Numbers,
    into: Bytes,
    places: Numbers,
) -> None:
    """Read some rows of a tensor into these places of `found`, forwards, near ones together."""
    width = into.shape[1]
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    cuts = np.flatnonzero(np.diff(rows) * width > _GAP + width) + 1
    for begin, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        if end > begin:
            first = int(rows[begin])
            span = np.empty((int(rows[end - 1]) - first + 1, width), np.uint8)
            source.read_bytes(name, first * width, span.reshape(-1).data)
            into[places[begin:end]] = span[rows[begin:end] - first]
