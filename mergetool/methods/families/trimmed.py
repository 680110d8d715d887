"""What methods share that keep the entries of a task vector whose magnitudes have certain ranks."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

from mergetool.methods.base import Field, Params, StatisticsPass, Stats, TensorGroup
from mergetool.methods.families.ranks import find, magnitudes
from mergetool.methods.families.scope import ScopedMethod
from mergetool.methods.families.sparse import SparseMethod


class TrimmedMethod(SparseMethod):
    """A method that keeps the largest entries of a task vector, or those after the very largest."""

    boundary: Literal["keep", "drop", "random"] = Field(
        "keep", description="entries exactly at a threshold: keep all, drop all, or keep the missing share at random"
    )
    pass_depends_on: ClassVar[tuple[str, ...] | None] = ("density",)
    exempt: ClassVar = {
        "seed-free boundary=random": "draws which of the entries at the threshold are kept",
        "tied boundary=random": "draws are keyed by the tensor's name, so two stored copies of a tensor get two draws",
    }

    @abstractmethod
    def bands(self, p: Params, num_elements: int) -> list[tuple[int, int]]:
        """For each model the ranks (1 is the largest magnitude) of the first and the last entry that are kept."""

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        if all(density == 1.0 for density in p.density) or num_elements == 0:
            return None
        bands = self.bands(p, num_elements)
        ranks = [(model, last) for model, (_, last) in enumerate(bands)]
        if any(first > 1 for first, _ in bands):
            ranks += [(model, first) for model, (first, _) in enumerate(bands)]
        return find(magnitudes, ranks, num_elements, bits, self.norms)

    def thin(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        if not stats:
            return
        thresholds = list(zip(stats["threshold"], stats["share"], stats["equal"], strict=True))
        count = len(group.names)
        for place, density in enumerate(p.density):
            if density == 1.0:  # even with `boundary: drop`, nothing is to go
                continue
            low, share, _ = thresholds[place]
            high, reached, equal = thresholds[count + place] if len(thresholds) > count else (math.inf, 0.0, 1.0)
            self._cut(group, place, low, high)
            if self.boundary == "random":
                skipped = max(0.0, reached - 1.0 / equal)
                if high > low and skipped > 0.0:
                    self._draw(group, place, high, (skipped, 1.0))
                self._draw(group, place, low, (skipped if high == low else 0.0, share))

    def _cut(self, group: TensorGroup, place: int, low: float, high: float) -> None:
        from mergetool.kernels.consensus import drop_larger_, keep_largest_

        inclusive = self.boundary != "drop"
        delta = keep_largest_(group.deltas[place], low, inclusive=inclusive)
        if high < math.inf:
            drop_larger_(delta, high, inclusive=not inclusive, scratch=group.scratch)

    def _draw(self, group: TensorGroup, place: int, magnitude: float, kept: tuple[float, float]) -> None:
        """Of the entries of this magnitude keep those whose draws lie between two numbers."""
        from mergetool.kernels.rng import keep_at, stream_key
        from mergetool.kernels.select import places_of

        skipped, share = kept
        if skipped == 0.0 and share >= 1.0:
            return
        key = stream_key(group.seed, group.name, group.names[place], f"{self.method_name()} boundary")
        delta = group.deltas[place]
        places = places_of(delta, magnitude)
        dropped = ~keep_at(key, places + group.start, share)
        if skipped > 0.0:
            dropped |= keep_at(key, places + group.start, skipped)
        delta.index_fill_(0, places[dropped].to(delta.device), 0.0)


class LargestMethod(TrimmedMethod, ScopedMethod):
    """A method that keeps the largest entries of a task vector, of each tensor or of the whole model."""

    def bands(self, p: Params, num_elements: int) -> list[tuple[int, int]]:
        return [(1, max(1, int(density * num_elements))) for density in p.density]
