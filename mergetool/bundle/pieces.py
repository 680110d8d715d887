"""Parameters that transformers makes of several tensors of a checkpoint, or of a part of one.

Experts of a mixture lie one by one in a checkpoint and side by side in memory; a projection to query, key and value may
lie in one tensor and be three parameters. Where everything went is read off a model that was loaded from tensors of
marks: the number of each tensor, and of each entry in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_DIGIT = 4096
"""Marks of entries are numbers of two digits, which float32 holds exactly."""
_FIRST = 7
"""The number of the first tensor: parameters that a checkpoint lacks are full of zeros or ones."""


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, and the entries of a tensor of the checkpoint that it holds."""

    box: tuple[tuple[int, int], ...]
    name: str
    start: int = 0
    """The first entry, where all others follow in order."""
    order: Tensor | None = None
    """The entries, where they do not."""

    def put(self, target: Tensor, source: Tensor) -> None:
        """Copy the entries from the tensor into the parameter."""
        place = target[tuple(slice(*each) for each in self.box)]
        flat = source.reshape(-1)
        taken = flat[self.start : self.start + place.numel()] if self.order is None else flat[self.order]
        place.copy_(taken.view(place.shape))


def marks(shapes: Mapping[str, tuple[int, ...]], digit: int) -> dict[str, Tensor]:
    """A checkpoint of marks: digit 0 is the number of each tensor, 1 and 2 are those of its entries."""
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if digit == 0:
            found[name] = torch.full(shape, float(number + _FIRST))
        else:
            entries = torch.arange(prod(shape)).view(shape)
            found[name] = (entries // _DIGIT if digit == 1 else entries % _DIGIT).float()
    return found


def whole_of(shapes: Mapping[str, tuple[int, ...]], numbers: Tensor) -> str | None:
    """The tensor that a parameter is, told from the marks of digit 0 in it; None where it is not one whole tensor."""
    number = float(numbers.reshape(-1)[0]) - _FIRST
    if number not in range(len(shapes)) or not bool((numbers == number + _FIRST).all()):
        return None
    name = list(shapes)[int(number)]
    return name if prod(shapes[name]) == numbers.numel() else None


def pieces_of(shapes: Mapping[str, tuple[int, ...]], digits: Sequence[Tensor]) -> tuple[Piece, ...]:
    """What a parameter is made of, told from all marks in it; empty where it is not made of whole boxes."""
    names, numbers = list(shapes), digits[0] - _FIRST
    if not bool(((numbers >= 0) & (numbers < len(names)) & (numbers == numbers.round())).all()):
        return ()
    entries = digits[1].long() * _DIGIT + digits[2].long()
    found = []
    for number in sorted(set(numbers.reshape(-1).tolist())):
        places = (numbers == number).nonzero()
        box = tuple(zip(places.amin(0).tolist(), (places.amax(0) + 1).tolist(), strict=True))
        held = entries[tuple(slice(*each) for each in box)].reshape(-1)
        if len(held) != len(places) or len(set(held.tolist())) != len(held):
            return ()
        start = int(held[0])
        in_order = torch.equal(held, torch.arange(start, start + len(held)))
        found.append(Piece(box, names[int(number)], start if in_order else 0, None if in_order else held))
    return tuple(found)


def composed(shape: tuple[int, ...], pieces: tuple[Piece, ...], read: Callable[[str], Tensor | None]) -> Tensor:
    """A parameter from its pieces; zeros where `read` has nothing."""
    target: Tensor | None = None
    for piece in pieces:
        if (source := read(piece.name)) is not None:
            target = source.new_zeros(shape) if target is None else target
            piece.put(target, source)
    return torch.zeros(shape) if target is None else target
