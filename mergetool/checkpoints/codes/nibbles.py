"""4-bit floats, two in a byte along a row, with a scale for every few numbers of a row (NVFP4, MXFP4).

    weight_packed (rows, columns / 2), weight_scale (rows, columns / 16)       8-bit floats; compressed-tensors divides
        weight_global_scale (1,)                                               them by one number
    weight (rows, columns / 2), weight_scale (rows, columns / 16)              ModelOpt multiplies them by one number
        weight_scale_2 ()
    weight_packed (rows, columns / 2), weight_scale (rows, columns / 32)       bytes: exponents, 127 more than meant

References: OCP Microscaling Formats (MX) 1.0; https://github.com/vllm-project/compressed-tensors;
https://github.com/NVIDIA/Model-Optimizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergetool.checkpoints.codes.base import Reader, Specs, Weight
from mergetool.checkpoints.codes.fours import VALUES

if TYPE_CHECKING:
    from torch import Tensor

_FORMS = (("weight_packed", "weight_scale", "weight_global_scale"), ("weight", "weight_scale", "weight_scale_2"))


@dataclass(frozen=True)
class Nibbles(Weight):
    """Rows of codes; `group` numbers share a scale."""

    scales: str
    group: int
    overall: str | None
    """One number for all scales."""
    divides: bool
    """Whether they are divided by it."""

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.codes, self.scales, self.overall)))

    def read(self, reader: Reader, start: int, out: "Tensor") -> None:
        import torch

        count = len(out)
        codes = reader.elements(self.codes, start // 2, -(-(start + count) // 2) - start // 2)
        both = torch.stack([codes & 15, codes >> 4], dim=1).flatten()[start % 2 :][:count]
        torch.mul(torch.tensor(VALUES)[both.int()], self._scales(reader, start, count), out=out)

    def _scales(self, reader: Reader, start: int, count: int) -> "Tensor":
        """The scale of each of some numbers."""
        first, last = start // self.group, -(-(start + count) // self.group)
        scales = reader.scales(self.scales, first, last - first)
        if self.overall is not None:
            overall = reader.elements(self.overall, 0, 1).float()
            scales = scales / overall if self.divides else scales * overall
        return scales.repeat_interleave(self.group)[start - first * self.group :][:count]


def find_nibbles(specs: Specs) -> Iterator[Weight]:
    """Every weight that is stored so."""
    for name, spec in specs.items():
        stem, _, leaf = name.rpartition(".")
        if spec.dtype.name == "U8" and len(spec.shape) == 2:
            for codes, *others in _FORMS:
                if leaf == codes:
                    yield from _fitting(specs, name, *(f"{stem}.{each}" for each in ("weight", *others)))


def _fitting(specs: Specs, codes: str, name: str, scales: str, overall: str) -> Iterator[Weight]:
    """The weight, if scales are there that fit its codes."""
    rows, width = specs[codes].shape
    grid = specs.get(scales)
    if grid is None or len(grid.shape) != 2 or grid.shape[0] != rows or 2 * width % max(1, grid.shape[1]):
        return
    has_overall = overall in specs and specs[overall].num_elements == 1
    if (grid.dtype.name, has_overall) in (("F8_E4M3", True), ("U8", False)):
        own = overall if has_overall else None
        yield Nibbles(
            name, (rows, 2 * width), codes, scales, 2 * width // grid.shape[1], own, codes.endswith("_packed")
        )
