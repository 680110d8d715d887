"""bitsandbytes' 4 bits: sixteen values (nf4 or fp4), and a scale for each run of 64 numbers, itself perhaps in 8 bits.

    weight (numbers / 2, 1)            two codes a byte, the first in the upper half
    weight.quant_map (16)              the values
    weight.absmax                      a scale for each run; with nested scales, codes of them:
    weight.nested_quant_map (256), weight.nested_absmax      scale = table[code] * nested_absmax[run of 256] + offset
    weight.quant_state.bitsandbytes__nf4                      JSON: shape, length of runs, offset

Reference: QLoRA, https://arxiv.org/abs/2305.14314, section 3; the storage is bitsandbytes'.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from mergetool.checkpoints.codes.base import Reader, Weight
from mergetool.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Blocks(Weight):
    """Codes of 4 bits with a scale for each run of `length` numbers."""

    state: str
    length: int
    nested: tuple[int, float] | None
    """Length of the runs of scales, and what is added to each, where the scales are codes, too."""

    @property
    def uses(self) -> tuple[str, ...]:
        tables = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if self.nested else ()))
        return (self.codes, self.state, *(f"{self.name}.{each}" for each in tables))

    def read(self, reader: Reader, start: int, out: "Tensor") -> None:
        stop, length = start + len(out), self.length
        first, last = start // length, -(-stop // length)
        begin, end = first * length, min(last * length, prod(self.shape))
        packed = reader.elements(self.codes, begin // 2, -(-end // 2) - begin // 2)
        values = self._pairs(reader).index_select(0, packed.int()).view(-1)[: end - begin]
        scales, full = self._scales(reader, first, last - first), (end - begin) // length
        values[: full * length].view(full, length).mul_(scales[:full, None])
        values[full * length :].mul_(scales[-1])
        out.copy_(values[start - begin : stop - begin])

    def _pairs(self, reader: Reader) -> "Tensor":
        """The two numbers that each byte stands for, before scaling."""
        import torch

        table = reader.whole(f"{self.name}.quant_map").float()
        return torch.cartesian_prod(table, table)

    def _scales(self, reader: Reader, first: int, count: int) -> "Tensor":
        scales = reader.elements(f"{self.name}.absmax", first, count)
        if self.nested is None:
            return scales.float()
        length, offset = self.nested
        low, high = first // length, -(-(first + count) // length)
        table = reader.whole(f"{self.name}.nested_quant_map").float()
        outer = reader.elements(f"{self.name}.nested_absmax", low, high - low).float().repeat_interleave(length)
        return table[scales.int()].mul_(outer[first - low * length :][:count]).add_(offset)


def describes_codes(name: str) -> bool:
    """Whether a tensor's values say what others are."""
    return _STATE in name or name.endswith(".weight_shape")


def find_blocks(reader: Reader) -> Iterator[Weight]:
    """Every weight that is stored so; the JSON beside each is read."""
    for state in [name for name in reader.specs if _STATE in name]:
        name = state.partition(_STATE)[0]
        said = _said(reader, state)
        shape, length = said.get("shape"), said.get("blocksize")
        nested = (said.get("nested_blocksize"), said.get("nested_offset")) if "nested_blocksize" in said else None
        fits = isinstance(shape, list) and all(type(each) is int for each in (*shape, length))
        if not fits or (nested and not (type(nested[0]) is int and isinstance(nested[1], int | float))):
            raise SourceError("the description of 4-bit codes lacks shape or blocksize", state, "get the model again")
        weight = Blocks(name, tuple(shape), name, state, length, nested)  # type: ignore[arg-type]
        if all(each in reader.specs for each in weight.uses):
            yield weight


def _said(reader: Reader, name: str) -> dict[str, Any]:
    try:
        description = json.loads(bytes(reader.elements(name, 0, reader.specs[name].num_elements).numpy()))
    except (ValueError, RecursionError):
        raise SourceError("the description of 4-bit codes is not JSON", name, "get the model again") from None
    return description if isinstance(description, dict) else {}
