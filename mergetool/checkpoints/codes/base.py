"""What a quantised weight is: the tensors that it is stored in, and how a slice of its numbers is made of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

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
    def read(self, model: ModelSource, start: int, out: "Tensor") -> None:
        """Fill `out` (float32, one axis) with elements of the weight, from element `start`. Thread-safe."""


def elements(model: ModelSource, name: str, start: int, count: int) -> "Tensor":
    """Elements of a stored tensor, as stored."""
    import torch

    dtype = model.specs[name].dtype
    stored = torch.empty(count, dtype=torch_dtype(dtype))
    model.read_bytes(name, start * dtype.bits // 8, bytes_of(stored))
    return stored


def numbers(model: ModelSource, name: str, start: int, count: int) -> "Tensor":
    """Elements of a tensor of scales as float32; bytes are exponents of two, as in the MX formats."""
    import torch

    found = elements(model, name, start, count)
    if found.dtype == torch.uint8:
        return (found.float() - 127.0).exp2()
    return found.float()
