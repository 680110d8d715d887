"""How deep in the network a tensor sits, told from names alone.

Repeated blocks are numbered somewhere in their names. Without a family file the number is the first integer path
component that follows a prefix under which several integers occur: `encoder.block.3.ffn.weight` has prefix
`encoder.block` and number 3. The numbers under one prefix, sorted, count its layers, so gaps (activations inside
a torch `Sequential`) do not matter, and every tower of a network counts its own.
"""

import re
from collections.abc import Iterable, Sequence

_EXPERT = re.compile(r"(experts)\.\d+(?=\.)")


def role(parts: Sequence[str]) -> str:
    """What stands behind the number of a layer: the same in every layer, and for every expert of a layer."""
    return _EXPERT.sub(r"\1.*", ".".join(parts))


def structural_depths(names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """(layer, number of layers) of every name, None for those outside repeated blocks."""
    names = list(names)
    numbers: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        for prefix, number in _integers(name):
            numbers.setdefault(prefix, set()).add(number)
    return {name: _depth(name, numbers) for name in names}


def block_depths(names: Iterable[str], blocks: Sequence[re.Pattern[str]]) -> dict[str, tuple[int, int] | None]:
    """The same, where `blocks` are patterns for how names of the repeated blocks begin.

    The integers in a pattern's groups, as a tuple, place the block; several groups (stage, block) count as one tower.
    """
    placed: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name in names:
        for tower, block in enumerate(blocks):
            match = block.match(name)
            if match:
                placed[name] = (tower, tuple(int(number) for number in match.groups()))
                break
    towers = {tower: sorted({at for t, at in placed.values() if t == tower}) for tower, _ in placed.values()}
    return {
        name: (towers[placed[name][0]].index(placed[name][1]), len(towers[placed[name][0]])) if name in placed else None
        for name in names
    }


def _integers(name: str) -> list[tuple[tuple[str, ...], int]]:
    parts = name.split(".")
    return [(tuple(parts[:k]), int(part)) for k, part in enumerate(parts) if part.isdecimal()]


def _depth(name: str, numbers: dict[tuple[str, ...], set[int]]) -> tuple[int, int] | None:
    for prefix, number in _integers(name):
        if len(numbers[prefix]) > 1:
            return sorted(numbers[prefix]).index(number), len(numbers[prefix])
    return None
