"""4-bit floats of GPT-OSS (MXFP4): the experts of a layer, 32 numbers in a row sharing a power of two.

    gate_up_proj_blocks (experts, out, in / 32, 16)     two codes a byte, the first in the lower half
    gate_up_proj_scales (experts, out, in / 32)         exponents, 127 more than meant
    gate_up_proj (experts, in, out)                     what they stand for: inputs first

Reference: OCP Microscaling Formats (MX) 1.0; read as transformers reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergetool.checkpoints.codes.base import Reader, Weight

if TYPE_CHECKING:
    from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-each for each in _MAGNITUDES))
"""What each code of 4 bits means."""
_BIAS = 127


@dataclass(frozen=True)
class Fours(Weight):
    """Experts of 4-bit floats. A slice of an expert is a few columns of its codes, so these are kept meanwhile."""

    scales: str

    @property
    def uses(self) -> tuple[str, ...]:
        return (self.codes, self.scales)

    def read(self, reader: Reader, start: int, out: "Tensor") -> None:
        _, inputs, outputs = self.shape
        size, done = inputs * outputs, 0
        while done < len(out):
            expert, place = divmod(start + done, size)
            count = min(len(out) - done, size - place)
            first, last = place // outputs, -(-(place + count) // outputs)
            rows = self._rows(reader, expert, first, last).reshape(-1)
            out[done : done + count] = rows[place - first * outputs :][:count]
            done += count

    def _rows(self, reader: Reader, expert: int, first: int, last: int) -> "Tensor":
        """Inputs [first, last) of an expert: (inputs, outputs)."""
        import torch

        codes = reader.part(self.codes, expert).flatten(1)[:, first // 2 : -(-last // 2)]
        both = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, first % 2 :][:, : last - first]
        values = torch.tensor(VALUES)[both.int()]
        exponents = reader.part(self.scales, expert).int() - _BIAS
        return torch.ldexp(values, exponents[:, torch.arange(first, last) // 32]).T


def find_fours(reader: Reader) -> Iterator[Weight]:
    """Every weight that is stored so."""
    for codes, spec in reader.specs.items():
        name = codes.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == codes or scales not in reader.specs or len(spec.shape) != 4 or spec.dtype.name != "U8":
            continue
        experts, outputs, groups, width = spec.shape
        if width == 16 and reader.specs[scales].shape == (experts, outputs, groups):
            yield Fours(name, (experts, 32 * groups, outputs), codes, scales)
