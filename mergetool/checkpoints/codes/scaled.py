"""8-bit floats and 8-bit integers: every number is its code times a scale, which a row, a group or a block share.

    weight (rows, columns)      weight_scale or weight_scale_inv: () or (1,)       one for the tensor
                                (rows, 1) or (rows,)                               one for each row
                                (rows / 128, columns / 128)                        one for each block (DeepSeek, Qwen)
    int8                        SCB (rows,): times SCB / 127                        bitsandbytes, LLM.int8()

References: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3; compressed-tensors,
https://github.com/vllm-project/compressed-tensors; LLM.int8(), https://arxiv.org/abs/2208.07339.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mergetool.checkpoints.codes.base import Reader, Settings, Specs, Weight
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = ("_scale_inv", "_scale")
_LLM_INT8 = 7.874015748031496e-3
"""1 / 127, by which LLM.int8() multiplies."""


@dataclass(frozen=True)
class Scaled(Weight):
    """Codes that a grid of scales lies over: `block` rows by columns share one."""

    scale: str
    grid: tuple[int, int]
    """Rows and columns of the scales of one matrix."""
    block: tuple[int, int]
    zero: str | None = None
    """What is subtracted from the codes first, on the same grid."""
    factor: float | None = None

    @property
    def uses(self) -> tuple[str, ...]:
        return (self.codes, self.scale, *((self.zero,) if self.zero else ()))

    def read(self, reader: Reader, start: int, out: "Tensor") -> None:
        codes = reader.elements(self.codes, start, len(out)).float()
        if self.zero is not None:
            codes -= self._over(reader, self.zero, start, len(out))
        codes *= self._over(reader, self.scale, start, len(out))
        out.copy_(codes if self.factor is None else codes.mul_(self.factor))

    def _over(self, reader: Reader, name: str, start: int, count: int) -> "Tensor":
        """The entry of a grid for each of some elements."""
        import torch

        if self.grid == (1, 1) and len(self.shape) <= 2:
            return reader.scales(name, 0, 1) if name == self.scale else reader.elements(name, 0, 1).float()
        width = self.shape[-1]
        height = self.shape[-2] if len(self.shape) > 1 else 1
        first, last = start // width, -(-(start + count) // width)
        rows = torch.arange(first, last)
        places = rows // height * self.grid[0] + rows % height // self.block[0]
        low, high = int(places[0]), int(places[-1]) + 1
        read = reader.scales if name == self.scale else reader.elements
        entries = read(name, low * self.grid[1], (high - low) * self.grid[1]).float().view(-1, self.grid[1])
        entries = entries[places - low].repeat_interleave(self.block[1], dim=1)[:, :width]
        return entries.reshape(-1)[start - first * width :][:count]


def find_scaled(specs: Specs, settings: Settings) -> Iterator[Weight]:
    """Every weight that is stored so."""
    for name, spec in specs.items():
        if spec.dtype.bits != 8 or not (spec.dtype.is_float or spec.dtype.name == "I8") or not spec.shape:
            continue
        stem = name.removesuffix(".weight")
        if spec.dtype.name == "I8" and len(spec.shape) == 2:
            scb = next((each for each in (f"{stem}.SCB", f"{name}.SCB") if each in specs), None)
            if scb is not None and specs[scb].shape == spec.shape[:1]:
                yield Scaled(name, spec.shape, name, scb, (spec.shape[0], 1), (1, spec.shape[1]), None, _LLM_INT8)
                continue
        scale = next((each for each in _scale_names(name, stem) if each in specs), None)
        grid = _grid(spec, specs[scale], settings) if scale else None
        if grid and spec.dtype.name == "I8" and not _is_integer(grid[0], str(scale), settings):
            continue
        zero = f"{name}_zero_point"
        if scale and grid:
            yield Scaled(name, spec.shape, name, scale, *grid, zero if zero in specs else None)


def _is_integer(grid: tuple[int, int], scale: str, settings: Settings) -> bool:
    """Whether bytes are whole numbers, and not pairs of 4-bit floats, which some keep in bytes of that type."""
    return not scale.endswith("_scale_inv") and (grid[1] == 1 or settings.get("quant_method") == "compressed-tensors")


def _scale_names(name: str, stem: str) -> tuple[str, ...]:
    return (*(f"{name}{end}" for end in _SCALES), f"{stem}.scale_weight", f"{stem}.weight_scale")


def _grid(spec: TensorSpec, scale: TensorSpec, settings: Settings) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The grid of scales over one matrix, and the block under each; None where they do not fit."""
    *outer, height, width = (1, *spec.shape) if len(spec.shape) < 2 else spec.shape
    count = prod(outer)
    if scale.num_elements == 1 and count == 1:
        return (1, 1), (height, width)
    if len(scale.shape) == len(spec.shape) - 1 and scale.shape == spec.shape[:-1]:
        return (height, 1), (1, width)
    if len(scale.shape) != len(spec.shape) or list(scale.shape[:-2]) != outer:
        return None
    rows, columns = scale.shape[-2:]
    for block in _blocks(settings):
        if (-(-height // block[0]), -(-width // block[1])) == (rows, columns):
            return (rows, columns), block
    if height % rows or width % columns:
        return None
    return (rows, columns), (height // rows, width // columns)


def _blocks(settings: Settings) -> Iterator[tuple[int, int]]:
    """Sizes of blocks that config.json states."""
    groups = settings.get("config_groups")
    stated = [settings.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        stated.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for block in stated:
        if isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block):
            yield block[0], block[1]
