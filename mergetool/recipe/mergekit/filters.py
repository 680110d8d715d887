"""Filters of a mergekit recipe -> globs: which value each setting takes, for every way the filters can fall.

A mergekit setting is a list of (substring, value) in which the first match wins; every setting has its own list. Our
overrides are one list of globs in which the first match wins, for all settings together. The first follows from the
second: take one branch of every list, in lexicographic order; a tensor's first match in that order is the choice of
every list's first match, because an earlier choice would have asked for less.

    weight: self_attn -> 1, mlp -> 2, else 3      *self_attn*  weight 1, density 5     (a norm has neither text)
    density: norm -> 4, else 5                    ...          *mlp*  weight 2, density 5   *norm*  weight 3, density 4
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import pairwise, permutations, product
from math import prod
from typing import Any, TypeVar

from mergetool.recipe.document import Place

MAX_CASES = 256
Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Branch:
    """One line of a setting: the value for tensors whose name contains `text` (None: all others), and its place."""

    text: str | None
    value: Any
    place: Place


@dataclass(frozen=True)
class Case:
    """Names that contain all of `texts`, and match no earlier case, take these branches."""

    texts: frozenset[str]
    branches: Mapping[Any, Branch]


def cases(cells: Mapping[Cell, Sequence[Branch]]) -> list[Case]:
    """Every way the filters of these settings can fall, in the order to be tried; the last needs no filter.

    Each setting's branches end with one without a text. Raises ValueError when there are more than `MAX_CASES`.
    """
    ordered = list(dict.fromkeys(_texts(branches) for branches in cells.values()))
    if prod(len(texts) for texts in ordered) > MAX_CASES:
        raise ValueError(f"these filters can fall in more than {MAX_CASES} ways")
    possible = []
    for choice in product(*(range(len(texts)) for texts in ordered)):
        chosen = list(zip(ordered, choice, strict=True))
        needed = frozenset(text for texts, i in chosen if (text := texts[i]) is not None)
        passed = [text for texts, i in chosen for text in texts[:i] if text is not None]
        if any(earlier in text for text in needed for earlier in passed):
            continue  # a name with the longer text has the shorter one, whose branch comes first
        index = dict(chosen)
        branches = {cell: lines[index[_texts(lines)]] for cell, lines in cells.items()}
        possible.append(Case(needed, branches))
    return possible


def _texts(branches: Sequence[Branch]) -> tuple[str | None, ...]:
    return tuple(branch.text for branch in branches)


def globs(texts: frozenset[str]) -> Iterator[str]:
    """Globs that together match exactly the names that contain every text (at least one)."""
    longest = [text for text in sorted(texts) if not any(text != other and text in other for other in texts)]
    for order in permutations(longest):
        joints = [_joints(left, right) for left, right in pairwise(order)]
        for overlaps in product(*joints):
            yield "*" + "".join(_chain(order, overlaps)) + "*"


def _joints(left: str, right: str) -> list[int | None]:
    """How `right` can follow `left` in a name: anywhere behind it (None), or sharing its last few characters."""
    return [None, *(n for n in range(1, min(len(left), len(right))) if left[-n:] == right[:n])]


def _chain(order: Sequence[str], overlaps: Sequence[int | None]) -> Iterator[str]:
    for text, overlap in zip(order, (0, *overlaps), strict=True):
        yield "*" + escape(text) if overlap is None else escape(text[overlap:])
