"""Which tensor of the base a tensor of an expert is, where one is saved with a head and the other is not.

embeddings.word_embeddings.weight      in the base, a BertModel
bert.embeddings.word_embeddings.weight in the expert, a BertForSequenceClassification
"""

from collections import Counter
from collections.abc import Collection, Sequence

_DEPTH = 3
"""Longest prefix that is tried, in parts of a name."""
_SHARE = 0.25
"""Share of the names that must begin with a prefix for it to be the network's."""


def counterparts(base: Collection[str], expert: Collection[str]) -> dict[str, str]:
    """The expert's name of every tensor of the base that it has.

    Of all prefixes that names begin with, the pair that lets most names meet; none on either side before others. Some
    classes are saved with a prefix before a few of their names only: what is left meets where one side has one.
    """
    pairs = [(ours, theirs) for ours in ("", *_prefixes(base, _SHARE)) for theirs in ("", *_prefixes(expert, _SHARE))]
    met = _best(pairs, list(base), set(expert))
    left, unknown = [name for name in base if name not in met], set(expert) - set(met.values())
    ours, theirs = _prefixes(left, 0), _prefixes(unknown, 0)
    more = _best([("", ""), *(("", each) for each in theirs), *((each, "") for each in ours)], left, unknown)
    return {name: met.get(name) or more[name] for name in base if name in met or name in more}


def _best(pairs: Sequence[tuple[str, str]], base: Collection[str], expert: Collection[str]) -> dict[str, str]:
    """What meets under the pair of prefixes that lets most names meet."""
    best: dict[str, str] = {}
    for ours, theirs in pairs:
        found = {name: renamed for name in base if (renamed := _renamed(name, ours, theirs)) in expert}
        if len(found) > len(best):
            best = found
    return best


def _renamed(name: str, ours: str, theirs: str) -> str:
    return theirs + name.removeprefix(ours) if name.startswith(ours) else ""


def _prefixes(names: Collection[str], share: float) -> list[str]:
    """Prefixes that this share of the names begin with, the shortest first."""
    parts = [name.split(".") for name in names]
    counted = Counter(".".join(each[:depth]) + "." for depth in range(1, _DEPTH + 1) for each in parts if each[depth:])
    return sorted((each for each, count in counted.items() if count >= share * len(parts)), key=len)
