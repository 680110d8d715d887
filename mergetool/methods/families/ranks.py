"""Values at given ranks of a tensor's scores, found exactly by passes that only count (`mergetool.kernels.select`).

A score is a number from 0 up that each entry has: the magnitude of a task vector, a variance over models ...
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergetool.methods.base import Params, StatisticsPass, Stats, TensorGroup

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.kernels.select import Bracket, RankedMagnitude, RankSearch

Scores = Callable[[TensorGroup, Params], "Sequence[Tensor]"]
"""Scores of all entries of a slice, one or more kinds; they may overwrite the models. Passes travel to other processes,
so it is a function of a module, or a method of one of our classes."""
Then = Callable[[Stats], "StatisticsPass | Stats"]
"""What comes once the values are known."""

SMALL = 1 << 12
"""Size up to which it is quicker to keep all entries than to count them."""
_LARGE = 1 << 18
"""Size from which on a sample pays."""
_MOST_KEPT = 1 << 23
"""Entries in all brackets together, as a sample tells, beyond which keeping them would take too much memory."""


def magnitudes(group: TensorGroup, p: Params) -> "Sequence[Tensor]":
    """Those of every task vector."""
    return [delta.abs_() for delta in group.deltas]


def find(
    scores: Scores, ranks: Sequence[tuple[int, int]], num_elements: int, bits: int, then: Then = dict
) -> StatisticsPass:
    """The first pass of a search for `ranks`: (which score, rank from 1, the largest), each on its own.

    In the end `then` is given `threshold`, the score at each rank, `equal`, how many entries have just that score, and
    `share`: the share of these that is within the rank.
    """
    from mergetool.kernels.select import Bracket, RankSearch

    which = tuple(place for place, _ in ranks)
    searches = tuple(RankSearch.begin(rank, bits) for _, rank in ranks)
    if bits == 32 and num_elements <= SMALL:
        return _Brackets(scores, then, which, searches, tuple(Bracket.of_all(rank) for _, rank in ranks))
    if bits == 32 and num_elements >= _LARGE:
        return _Sample(scores, then, which, searches, num_elements)
    return _Thresholds(scores, then, which, searches)


def find_signed(
    scores: Scores, ranks: Sequence[tuple[int, int]], num_elements: int, bits: int, then: Then
) -> StatisticsPass:
    """The same for scores of either sign: first among those above 0, where the search nearly always ends.

    `then` is only given `threshold`.
    """
    below = _Below(scores, tuple(ranks), num_elements, bits, then)
    return find(_OfSign(scores, 1), ranks, num_elements, bits, below)


@dataclass(frozen=True)
class _OfSign:
    """Scores of one sign as numbers from 0 up; the others are 0."""

    scores: Scores
    sign: int

    def __call__(self, group: TensorGroup, p: Params) -> "Sequence[Tensor]":
        scores = self.scores(group, p)
        for each in scores:
            (each if self.sign > 0 else each.neg_()).clamp_(min=0.0).abs_()  # no zero keeps a sign
        return scores


@dataclass(frozen=True)
class _Below:
    """What comes after the scores above 0: those below, if one of the ranks is not among the first."""

    scores: Scores
    ranks: tuple[tuple[int, int], ...]
    size: int
    bits: int
    then: Then

    def __call__(self, found: Stats) -> StatisticsPass | Stats:
        values = found["threshold"]
        if all(values):
            return self.then({"threshold": values})
        from_below = [(which, self.size - rank + 1) for which, rank in self.ranks]
        return find(_OfSign(self.scores, -1), from_below, self.size, self.bits, _Both(values, self.then))


@dataclass(frozen=True)
class _Both:
    """What comes after those below 0, too."""

    above: tuple[float, ...]
    then: Then

    def __call__(self, found: Stats) -> StatisticsPass | Stats:
        return self.then({"threshold": tuple(p or -n for p, n in zip(self.above, found["threshold"], strict=True))})


@dataclass(frozen=True)
class _Search(StatisticsPass):
    """What all passes of a search know."""

    scores: Scores
    then: Then
    which: tuple[int, ...]
    searches: "tuple[RankSearch, ...]"

    def ended(self, ranked: "Sequence[RankedMagnitude]") -> "StatisticsPass | Stats":
        ranks = [search.rank for search in self.searches]
        shares = tuple((rank - each.above) / each.equal for rank, each in zip(ranks, ranked, strict=True))
        thresholds, equal = (tuple(each.magnitude for each in ranked), tuple(float(each.equal) for each in ranked))
        return self.then({"threshold": thresholds, "share": shares, "equal": equal})


@dataclass(frozen=True)
class _Thresholds(_Search):
    """One counting pass for every rank."""

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.select import Count

        counts = {key: Count(search) for key, search in zip(self._keys(), self.searches, strict=True)}
        for group in groups:
            scores = self.scores(group, p)
            for (place, *_), count in counts.items():
                count.add(scores[place].reshape(-1))
        histograms = {key: count.histogram() for key, count in counts.items()}
        return torch.stack([histograms[key] for key in self._keys()]).to("cpu")

    def _keys(self) -> list[tuple[int, int, int]]:
        """Which scores each rank is looked for in, and among which of them: for many ranks they are the same."""
        return [(place, each.shift, each.prefix) for place, each in zip(self.which, self.searches, strict=True)]

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        from mergetool.kernels.select import RankedMagnitude, RankSearch

        narrowed = [search.narrow(counts) for search, counts in zip(self.searches, total, strict=True)]
        if unfinished := tuple(each for each in narrowed if isinstance(each, RankSearch)):
            return _Thresholds(self.scores, self.then, self.which, unfinished)
        return self.ended([each for each in narrowed if isinstance(each, RankedMagnitude)])


@dataclass(frozen=True)
class _Sample(_Thresholds):
    """The first of those passes over a sample of the entries, which says where to look."""

    num_elements: int
    one_in = 16

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        from mergetool.kernels.select import Bracket

        ranks = [search.rank for search in self.searches]
        guesses = [Bracket.around(rank, self.num_elements, counts) for rank, counts in zip(ranks, total, strict=True)]
        brackets = tuple(guess for guess in guesses if guess is not None)
        kept = sum(bracket.share for bracket in brackets) * self.num_elements
        if len(brackets) < len(ranks) or kept > _MOST_KEPT:
            return _Thresholds(self.scores, self.then, self.which, self.searches)
        return _Brackets(self.scores, self.then, self.which, self.searches, brackets)


@dataclass(frozen=True)
class _Brackets(_Search):
    """One pass that keeps the few entries among which every rank should be; if one is not, all are counted."""

    brackets: "tuple[Bracket, ...]"
    joined = True

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.select import Tally

        tallies = [Tally(bracket) for bracket in self.brackets]
        for group in groups:
            scores = self.scores(group, p)
            Tally.add_all(tallies, [scores[place].reshape(-1) for place in self.which])
        tables = [tally.table() for tally in tallies]
        return torch.cat([torch.nn.functional.pad(table, (1, 0), value=i) for i, table in enumerate(tables)])

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        settled = [bracket.settle(total[total[:, 0] == i, 1:]) for i, bracket in enumerate(self.brackets)]
        ranked = [each for each in settled if each is not None]
        if len(ranked) < len(settled):
            return _Thresholds(self.scores, self.then, self.which, self.searches)
        return self.ended(ranked)
