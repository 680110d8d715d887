"""The one table of storage dtypes: safetensors name, torch name, bits, and whether a merge does arithmetic on it.

Imports no torch: plans are made from headers alone. `torch_dtype` looks the name up when bytes become tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One storage dtype. `torch_name` is empty where torch has none; `bits` is the size of one element."""

    name: str
    torch_name: str
    bits: int
    is_float: bool
    largest: float = 0.0

    @property
    def is_complex(self) -> bool:
        return self.name.startswith("C")

    def num_bytes(self, num_elements: int) -> int:
        """Bytes of `num_elements` packed elements."""
        return (num_elements * self.bits + 7) // 8


_TABLE = (  # in the order in which the safetensors library lays tensors out
    DType("U64", "uint64", 64, is_float=False),
    DType("I64", "int64", 64, is_float=False),
    DType("F64", "float64", 64, is_float=True, largest=1.7976931348623157e308),
    DType("C64", "complex64", 64, is_float=False),
    DType("F32", "float32", 32, is_float=True, largest=3.4028234663852886e38),
    DType("U32", "uint32", 32, is_float=False),
    DType("I32", "int32", 32, is_float=False),
    DType("BF16", "bfloat16", 16, is_float=True, largest=3.3895313892515355e38),
    DType("F16", "float16", 16, is_float=True, largest=65504.0),
    DType("U16", "uint16", 16, is_float=False),
    DType("I16", "int16", 16, is_float=False),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, is_float=True, largest=57344.0),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, is_float=True, largest=240.0),
    DType("F8_E8M0", "float8_e8m0fnu", 8, is_float=False),
    DType("F8_E4M3", "float8_e4m3fn", 8, is_float=True, largest=448.0),
    DType("F8_E5M2", "float8_e5m2", 8, is_float=True, largest=57344.0),
    DType("I8", "int8", 8, is_float=False),
    DType("U8", "uint8", 8, is_float=False),
    DType("F6_E3M2", "", 6, is_float=False),
    DType("F6_E2M3", "", 6, is_float=False),
    DType("F4", "", 4, is_float=False),  # torch's float4 holds two values in one element
    DType("BOOL", "bool", 8, is_float=False),
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
ORDER = {name: place for place, name in enumerate(BY_NAME)}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in _TABLE if dtype.torch_name}


def of_torch(dtype: "torch.dtype") -> DType:
    """The table row of a torch dtype. Raises KeyError for dtypes no safetensors file can hold."""
    return BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def torch_dtype(dtype: DType) -> "torch.dtype":
    """The torch dtype of a row. Raises KeyError where this torch has none."""
    import torch

    known: Any = getattr(torch, dtype.torch_name, None) if dtype.torch_name else None
    if known is None:
        raise KeyError(dtype.name)
    return known  # type: ignore[no-any-return]
