"""Small integers packed into 32 bits, with a zero point and a scale for every group of inputs.

    GPTQ                 qweight (in / 8, out): inputs packed; qzeros (groups, out / 8), in format 1 one less;
                         scales (groups, out); g_idx (in): the group of each input
    AWQ                  qweight (in, out / 8), qzeros (groups, out / 8): outputs packed in the order 0 2 4 6 1 3 5 7
    compressed-tensors   weight_packed (out, in / 8), counted from the middle; weight_scale (out, groups);
                         weight_zero_point (out / 8, groups) perhaps; weight_shape; weight_g_idx perhaps

(8 for 4 bits; of GPTQ's 3 bits, 32 in a row fill three words.) The number is `scale * (code - zero)`. Stored with
inputs first, a slice of the weight is a few columns of what is packed, so the codes of one weight are kept while it is
read.

References: GPTQ, https://arxiv.org/abs/2210.17323; AWQ, https://arxiv.org/abs/2306.00978; compressed-tensors,
https://github.com/vllm-project/compressed-tensors.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergetool.checkpoints.codes.base import Reader, Settings, Specs, Weight

if TYPE_CHECKING:
    from torch import Tensor

_BITS = (2, 4, 8)
_THREES = 3
"""Bits of a code that may lie in two words."""
_BY_GPTQMODEL = (0x24924924, 0x92492492, 0x49249249)
"""What GPTQModel takes from words of 3-bit zero points when it writes format 1, and adds when it reads it."""
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the output of each number lies among those that AWQ packs together."""


@dataclass(frozen=True)
class _Packed(Weight):
    bits: int
    zeros: str | None
    scales: str
    index: str | None
    """The tensor that says which group each input is of; without one, groups follow each other."""

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.codes, self.zeros, self.scales, self.index)))

    def read(self, reader: Reader, start: int, out: "Tensor") -> None:
        width = self.shape[1]
        first, last = start // width, -(-(start + len(out)) // width)
        rows = self._rows(reader, first, last)
        out.copy_(rows.reshape(-1)[start - first * width :][: len(out)])

    @abstractmethod
    def _rows(self, reader: Reader, first: int, last: int) -> "Tensor":
        """Outputs [first, last): (outputs, inputs), float32."""

    def _groups(self, reader: Reader, count: int) -> "Tensor":
        """The group of every input."""
        import torch

        if self.index is not None:
            return reader.whole(self.index).long()
        return torch.arange(self.shape[1]) // -(-self.shape[1] // count)


class InputsFirst(_Packed):
    """GPTQ and AWQ."""

    def _rows(self, reader: Reader, first: int, last: int) -> "Tensor":
        scales = reader.whole(self.scales)[:, first:last].float()
        zeros = self._outputs_packed(reader.whole(self.zeros or ""), first, last)
        groups = self._groups(reader, len(scales))
        codes = self._codes(reader, first, last)
        return ((codes - zeros[groups]).float() * scales[groups]).T

    @abstractmethod
    def _codes(self, reader: Reader, first: int, last: int) -> "Tensor":
        """(inputs, outputs)."""

    @abstractmethod
    def _outputs_packed(self, packed: "Tensor", first: int, last: int) -> "Tensor":
        """Columns [first, last) of what has its outputs packed."""


@dataclass(frozen=True)
class Gptq(InputsFirst):
    """Inputs packed one after the other."""

    words: tuple[int, ...]
    """What is added to the words of zero points, in turn: those that are packed together change together, so that what
    went over the edge comes back."""
    more: int
    """What is added to zero points themselves."""

    def _codes(self, reader: Reader, first: int, last: int) -> "Tensor":
        return _in_a_row(reader.whole(self.codes)[:, first:last].T, self.bits).T[: self.shape[1]]

    def _outputs_packed(self, packed: "Tensor", first: int, last: int) -> "Tensor":
        import torch

        each, width = (32, _THREES) if self.bits == _THREES else (32 // self.bits, 1)
        low = first // each
        words = packed[:, low * width : -(-last // each) * width]
        if self.words:
            added = torch.tensor(self.words).repeat(words.shape[1] // len(self.words))
            words = (words + added).to(torch.int32)
        zeros = (_in_a_row(words, self.bits) + self.more) & ((1 << self.bits) - 1)
        return zeros[:, first - low * each : last - low * each]


@dataclass(frozen=True)
class Awq(InputsFirst):
    """Outputs packed, in an order of their own."""

    def _codes(self, reader: Reader, first: int, last: int) -> "Tensor":
        return self._outputs_packed(reader.whole(self.codes), first, last)

    def _outputs_packed(self, packed: "Tensor", first: int, last: int) -> "Tensor":
        low = first // 8
        unpacked = _unpacked(packed[:, low : -(-last // 8)], 4)[..., list(_AWQ_PLACES)]
        return unpacked.flatten(1)[:, first - low * 8 : last - low * 8]


@dataclass(frozen=True)
class Compressed(_Packed):
    """compressed-tensors: rows of codes counted from the middle."""

    described: str

    @property
    def uses(self) -> tuple[str, ...]:
        return (*super().uses, self.described)

    def _rows(self, reader: Reader, first: int, last: int) -> "Tensor":
        columns, count = (reader.specs[each].shape[1] for each in (self.codes, self.scales))
        packed = reader.elements(self.codes, first * columns, (last - first) * columns).view(-1, columns)
        codes = _unpacked(packed, self.bits).flatten(1)[:, : self.shape[1]]
        groups = self._groups(reader, count)
        if self.zeros is None:
            codes = codes - (1 << (self.bits - 1))
        else:
            codes = codes - self._zeros(reader.whole(self.zeros), first, last)[:, groups]
        scales = reader.scales(self.scales, first * count, (last - first) * count).view(-1, count)
        return codes.float() * scales[:, groups]

    def _zeros(self, packed: "Tensor", first: int, last: int) -> "Tensor":
        each = 32 // self.bits
        low = first // each
        zeros = _unpacked(packed[low : -(-last // each)], self.bits).transpose(1, 2).flatten(0, 1)
        return zeros[first - low * each : last - low * each]


def _in_a_row(packed: "Tensor", bits: int) -> "Tensor":
    """The codes of all words of the last axis."""
    import torch

    if bits != _THREES:
        return _unpacked(packed, bits).flatten(-2)
    words = packed.reshape(*packed.shape[:-1], -1, _THREES).long() & 0xFFFFFFFF
    places = torch.arange(0, 32 * bits, bits)
    both = words | words.roll(-1, -1) << 32  # each word, and the one that follows it
    codes: Tensor = both[..., places // 32] >> places % 32 & 7
    return codes.flatten(-2).int()


def _unpacked(packed: "Tensor", bits: int) -> "Tensor":
    """The codes in each of 32 bits, along a new last axis."""
    import torch

    places = torch.arange(0, 32, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> places) & ((1 << bits) - 1)


# -------------------------------------------------------------------- finding them


def find_packed(reader: Reader, settings: Settings) -> Iterator[Weight]:
    """Every weight that is stored so."""
    for name, spec in reader.specs.items():
        stem, _, leaf = name.rpartition(".")
        if spec.dtype.name != "I32" or len(spec.shape) != 2:
            continue
        if leaf == "qweight":
            yield from _inputs_first(reader.specs, stem, settings)
        elif leaf == "weight_packed":
            yield from _compressed(reader, stem)


def _inputs_first(specs: Specs, stem: str, settings: Settings) -> Iterator[Weight]:
    codes, zeros, scales, index = (f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx"))
    if zeros not in specs or scales not in specs:
        return
    (height, width), (groups, outputs) = specs[codes].shape, specs[scales].shape
    name, own_index = f"{stem}.weight", index if index in specs else None
    if own_index is None and outputs == 8 * width and specs[zeros].shape == (groups, width):
        if str(settings.get("version", "gemm")).lower() == "gemm" and height % groups == 0:
            yield Awq(name, (outputs, height), codes, 4, zeros, scales, None)
        return
    inputs = specs[index].shape[0] if own_index else 32 * height // int(settings.get("bits") or 4)
    bits = 32 * height // inputs if inputs else 0
    kind = settings.get("checkpoint_format") or "gptq"
    odd = bits == _THREES and (inputs % 32 or outputs % 32)
    fits = not odd and specs[zeros].shape == (groups, -(-outputs * bits // 32)) and height == -(-inputs * bits // 32)
    if outputs == width and bits in (_THREES, *_BITS) and fits and kind in ("gptq", "gptq_v2"):
        words, more = _added(bits, settings) if kind == "gptq" else ((), 0)
        yield Gptq(name, (outputs, inputs), codes, bits, zeros, scales, own_index, words, more)


def _added(bits: int, settings: Settings) -> tuple[tuple[int, ...], int]:
    """What is added to words of zero points in format 1, which are one less than meant, and to zero points."""
    if bits != _THREES:
        return (sum(1 << place for place in range(0, 32, bits)),), 0
    meta = settings.get("meta")
    writers = str(meta.get("quantizer") or "") if isinstance(meta, dict) else ""
    return (_BY_GPTQMODEL, 0) if "gptqmodel" in writers.lower() else ((), 1)


def _compressed(reader: Reader, stem: str) -> Iterator[Weight]:
    leaves = ("packed", "scale", "shape", "zero_point", "g_idx")
    codes, scales, described, zeros, index = (f"{stem}.weight_{leaf}" for leaf in leaves)
    if scales not in reader.specs or described not in reader.specs or reader.specs[described].num_elements != 2:
        return
    height, width = reader.specs[codes].shape
    rows, columns = (int(each) for each in reader.elements(described, 0, 2))
    own_zeros, own_index = (each if each in reader.specs else None for each in (zeros, index))
    for bits in _BITS:
        grid = reader.specs[scales].shape
        if (rows, -(-columns * bits // 32)) == (height, width) and len(grid) == 2 and grid[0] == rows:
            name = f"{stem}.weight"
            yield Compressed(name, (rows, columns), codes, bits, own_zeros, scales, own_index, described)
            return
