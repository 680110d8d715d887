"""What a quantised weight is: the tensors that it is stored in, and how a slice of its numbers is made of them."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any

from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_BYTES = 64 << 20
Specs = Mapping[str, TensorSpec]
Settings = Mapping[str, Any]
"""What config.json says of the codes (`quantization_config`)."""


@dataclass(frozen=True)
class Weight(ABC):
    """One weight. `codes` is the largest of the tensors it is stored in: where it is read, reading goes forwards."""

    name: str
    shape: tuple[int, ...]
    codes: str

    @property
    @abstractmethod
    def uses(self) -> tuple[str, ...]:
        """All tensors that it is stored in."""

    @abstractmethod
    def read(self, reader: "Reader", start: int, out: "Tensor") -> None:
        """Fill `out` (float32, one axis) with elements of the weight, from element `start`. Thread-safe."""


class Reader:
    """Reads stored tensors. Safe for any number of threads."""

    def __init__(self, model: ModelSource) -> None:
        self.model, self.specs = model, model.specs
        self._kept: OrderedDict[tuple[str, int | None], Tensor] = OrderedDict()
        self._lock = Lock()

    def elements(self, name: str, start: int, count: int) -> "Tensor":
        """Elements of a tensor, as stored."""
        import torch

        dtype = self.specs[name].dtype
        stored = torch.empty(count, dtype=torch_dtype(dtype))
        self.model.read_bytes(name, start * dtype.bits // 8, bytes_of(stored))
        return stored

    def scales(self, name: str, start: int, count: int) -> "Tensor":
        """Elements of a tensor of scales as float32; bytes are exponents of two, as in the MX formats."""
        import torch

        stored = self.elements(name, start, count)
        return (stored.float() - 127.0).exp2() if stored.dtype == torch.uint8 else stored.float()

    def whole(self, name: str) -> "Tensor":
        """A tensor in full; those that were asked for last are kept."""
        spec = self.specs[name]
        return self._keep((name, None), lambda: self.elements(name, 0, spec.num_elements).view(spec.shape))

    def part(self, name: str, index: int) -> "Tensor":
        """One entry of the first axis of a tensor, kept in the same way."""
        _, *shape = self.specs[name].shape
        size = prod(shape)
        return self._keep((name, index), lambda: self.elements(name, index * size, size).view(shape))

    def _keep(self, key: tuple[str, int | None], read: Callable[[], "Tensor"]) -> "Tensor":
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = read()
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return value
