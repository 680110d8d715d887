"""Which tensor of the base a tensor of an expert is, where one is saved with a head and the other is not.

embeddings.word_embeddings.weight      in the base, a BertModel
bert.embeddings.word_embeddings.weight in the expert, a BertForSequenceClassification
"""

from collections import Counter
from collections.abc import Collection

_DEPTH = 3
"""Longest prefix that is tried, in parts of a name."""


def counterparts(base: Collection[str], expert: Collection[str]) -> dict[str, str]:
    """The expert's name of every tensor of the base that it has.

    Of all prefixes that names begin with, the pair that lets most names meet; none on either side before others.
    """
    known = set(expert)
    best: dict[str, str] = {}
    for ours in ("", *_prefixes(base)):
        for theirs in ("", *_prefixes(expert)):
            found = {name: met for name in base if (met := _renamed(name, ours, theirs)) in known}
            if len(found) > len(best):
                best = found
    return best


def _renamed(name: str, ours: str, theirs: str) -> str:
    return theirs + name.removeprefix(ours) if name.startswith(ours) else ""


def _prefixes(names: Collection[str]) -> list[str]:
    """Prefixes that a fair share of the names begin with, the shortest first."""
    parts = [name.split(".") for name in names]
    counted = Counter(".".join(each[:depth]) + "." for depth in range(1, _DEPTH + 1) for each in parts if each[depth:])
    return sorted((each for each, count in counted.items() if count * 4 >= len(parts)), key=len)
