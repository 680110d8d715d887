"""Where in the depth of a network a tensor sits, read off the names alone.

The layers are the numbered children of the repeated block: the name part that is an integer, at the place where the
largest family of sibling numbers lives (`model.layers.0` ... `model.layers.31`). Depth runs from 0 (first layer) to 1
(last layer). A tensor outside the layers takes the depth of the first layer, so that embeddings follow the start of a
gradient; write an override to give the head the end of it.
"""

from collections import defaultdict
from collections.abc import Iterable


def depths(names: Iterable[str]) -> dict[str, float]:
    """Depth in [0, 1] of every tensor name."""
    names = list(names)
    families: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for name in names:
        for prefix, number in _numbers(name):
            families[prefix].add(number)
    found = {}
    for name in names:
        placed = [(prefix, number) for prefix, number in _numbers(name) if len(families[prefix]) > 1]
        if placed:
            prefix, number = placed[0]
            order = sorted(families[prefix])
            found[name] = order.index(number) / (len(order) - 1)
        else:
            found[name] = 0.0
    return found


def _numbers(name: str) -> list[tuple[tuple[str, ...], int]]:
    parts = name.split(".")
    return [(tuple(parts[:at]), int(part)) for at, part in enumerate(parts) if part.isdecimal()]
