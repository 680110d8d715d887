"""Trim task vectors, elect a sign for every entry, merge the entries that agree.

Fine-tuned models disturb one another in two ways: many of their changes are tiny and mean nothing, and some changes
have opposite signs. TIES keeps the largest `density` of each task vector, lets the weighted sum decide the sign of
every entry, and averages only the values that have it.

Reference: Yadav et al., TIES-Merging, NeurIPS 2023, https://arxiv.org/abs/2306.01708, section 3, algorithm 1.
Differs from the paper: trimming is per tensor unless `scope: model`, which is the paper's; thresholds are exact, and
what happens to entries exactly at the threshold is a choice (`boundary`; with 16-bit models they are many). Weights
act before the vote. An entry whose weighted sum is exactly 0 has no majority and keeps the base's value (the authors'
code gives it the sign that is most frequent in the whole model).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import (
    Field,
    Finite,
    Fraction,
    Params,
    PerModel,
    Scheduled,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.kernels.select import Bracket, RankedMagnitude, RankSearch


_LARGE, _TOO_LARGE = 1 << 18, 1 << 26
"""Sizes between which a sample pays and the entries in the brackets fit into memory."""


@dataclass(frozen=True)
class _Thresholds(StatisticsPass):
    """One counting pass of the search for every model's threshold."""

    searches: "tuple[RankSearch, ...]"

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.select import Count

        counts = [Count(search) for search in self.searches]
        for group in groups:
            for count, delta in zip(counts, group.deltas, strict=True):
                count.add(delta.abs_())
        return torch.stack([count.histogram() for count in counts])

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        from mergetool.kernels.select import RankedMagnitude, RankSearch

        found = [search.narrow(counts) for search, counts in zip(self.searches, total, strict=True)]
        if unfinished := tuple(each for each in found if isinstance(each, RankSearch)):
            return _Thresholds(unfinished)
        ended = [each for each in found if isinstance(each, RankedMagnitude)]
        return _stats([search.rank for search in self.searches], ended)


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
        return _Brackets(brackets, self.searches) if len(brackets) == len(ranks) else _Thresholds(self.searches)


@dataclass(frozen=True)
class _Brackets(StatisticsPass):
    """One pass that keeps the few entries among which every model's threshold should be."""

    brackets: "tuple[Bracket, ...]"
    searches: "tuple[RankSearch, ...]"
    """What to do if it is not."""
    joined = True

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        import torch

        from mergetool.kernels.select import Tally

        tallies = [Tally(bracket) for bracket in self.brackets]
        for group in groups:
            for tally, delta in zip(tallies, group.deltas, strict=True):
                tally.add(delta.abs_())
        tables = [tally.table() for tally in tallies]
        return torch.cat([torch.nn.functional.pad(table, (1, 0), value=i) for i, table in enumerate(tables)])

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        settled = [bracket.settle(total[total[:, 0] == i, 1:]) for i, bracket in enumerate(self.brackets)]
        found = [each for each in settled if each is not None]
        ranks = [bracket.rank for bracket in self.brackets]
        return _stats(ranks, found) if len(found) == len(settled) else _Thresholds(self.searches)


def _stats(ranks: list[int], found: "list[RankedMagnitude]") -> Stats:
    return {
        "threshold": tuple(each.magnitude for each in found),
        "share": tuple((rank - each.above) / each.equal for rank, each in zip(ranks, found, strict=True)),
    }


class Ties(TensorMethod):
    """`base + scale * mean of the trimmed task vectors that agree with the elected sign`"""

    method: Literal["ties"] = "ties"
    density: PerModel[Fraction] = Field(0.2, description="share of each task vector that is kept")
    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector, in the vote and in the mean")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector (lambda in the paper)")
    scope: Literal["tensor", "model"] = Field("tensor", description="what `density` is a share of")
    boundary: Literal["keep", "drop", "random"] = Field(
        "keep", description="entries exactly at the threshold: keep all, drop all, or keep the missing share at random"
    )
    normalize: bool = Field(True, strict=True, description="divide by the weights that agree (mean); false: sum")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 6
    pass_depends_on: ClassVar = ("density",)
    neutral: ClassVar = {"density": 1.0, "normalize": True}
    exempt: ClassVar = {
        "independent scope=model": "one threshold for all tensors together depends on all of them",
        "seed-free boundary=random": "draws which of the entries at the threshold are kept",
        "tied boundary=random": "draws are keyed by the tensor's name, so two stored copies of a tensor get two draws",
    }

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        from mergetool.kernels.select import RankSearch

        if all(density == 1.0 for density in p.density) or num_elements == 0:
            return None
        searches = tuple(RankSearch.begin(max(1, int(density * num_elements)), bits) for density in p.density)
        if bits == 32 and _LARGE <= num_elements <= _TOO_LARGE:
            return _Sample(searches, num_elements)
        return _Thresholds(searches)

    def pass_scope(self) -> Literal["tensor", "model"]:
        return self.scope

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        from mergetool.kernels.consensus import agreeing_sum_

        if stats:
            self._trim(group, p, stats)
        merged = agreeing_sum_(group.deltas, p.weight, normalize=self.normalize, scratch=group.scratch)
        assert group.base is not None
        return group.base.add_(merged, alpha=p.scale)

    def _trim(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        from mergetool.kernels.consensus import keep_largest_
        from mergetool.kernels.rng import keep_at, stream_key
        from mergetool.kernels.select import places_of

        for name, delta, density, threshold, share in zip(
            group.names, group.deltas, p.density, stats["threshold"], stats["share"], strict=True
        ):
            if density == 1.0:  # even with `boundary: drop`, nothing is to go
                continue
            keep_largest_(delta, threshold, inclusive=self.boundary != "drop")
            if self.boundary == "random" and share < 1.0:
                key = stream_key(group.seed, group.name, name, "ties boundary")
                places = places_of(delta, threshold)
                dropped = places[~keep_at(key, places + group.start, share)]
                delta.index_fill_(0, dropped.to(delta.device), 0.0)
