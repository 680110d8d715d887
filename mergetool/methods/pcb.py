"""Let entries compete, within their task vector by size and between task vectors by agreement; the best are averaged.

An entry that is large in its own task vector matters to its task; one that has the sign of the sum of all task vectors
is in nobody's way. Both together are its score. Of each task vector only the `density` with the highest scores count,
from 0 at the threshold to 1 at the top, and every entry of the result is the mean of the models' changes by these
scores. All thresholds are those of the whole model.

Reference: Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024,
https://arxiv.org/abs/2410.02396, section 3. `density`, `clip` and `scale` are those of the authors' code.
Differs from the paper: nothing is searched for; `weight` is where the authors' search acts. Scores are those of the
authors' code, which leaves out what the paper says about the mean of the vote. Where all scores that count are equal,
each counts in full (the authors' code divides by 0). `scope: tensor` is not the paper's.
"""

from collections.abc import Sequence
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
    Unit,
)
from mergetool.methods.families.ranks import find, find_signed, magnitudes
from mergetool.methods.families.scope import ScopedMethod

if TYPE_CHECKING:
    from torch import Tensor

_LOWEST = "the lowest of the scores that count is 0, even where all of them are to count"


@dataclass(frozen=True)
class _Scores:
    """Those of all entries, once clips are known."""

    clips: tuple[tuple[float, float], ...]

    def __call__(self, group: TensorGroup, p: Params) -> "Sequence[Tensor]":
        from mergetool.kernels.competition import Clip, score_

        score_(group.deltas, [Clip(*clip) for clip in self.clips], group.scratch)
        return group.deltas

    def found(self, values: Stats) -> Stats:
        """All that merging must know, with the highest scores and the lowest that count."""
        half, (low, high) = len(self.clips), zip(*self.clips, strict=True)
        return {"low": low, "high": high, "top": values["threshold"][:half], "cut": values["threshold"][half:]}


@dataclass(frozen=True)
class _Search:
    """What comes once clips are known: the search for each model's highest score, and for the lowest that counts."""

    density: tuple[float, ...]
    size: int
    bits: int

    def __call__(self, found: Stats) -> StatisticsPass | Stats:
        half = len(self.density)
        scores = _Scores(tuple(zip(found["threshold"][:half], found["threshold"][half:], strict=True)))
        lowest = [max(1, self.size - int(self.size * (1.0 - density))) for density in self.density]
        ranks = [(model, 1) for model in range(half)] + list(enumerate(lowest))
        return find_signed(scores, ranks, self.size, self.bits, scores.found)


class Pcb(ScopedMethod):
    """`base + scale * sum(w_i score_i (x_i - base)) / sum(score_i)`"""

    method: Literal["pcb"] = "pcb"
    density: PerModel[Fraction] = Field(0.1, description="share of each task vector that counts")
    weight: PerModel[Finite] = Field(1.0, description="factor on each task vector, after the competition")
    scale: Scheduled[Finite] = Field(1.2, description="factor on the merged task vector (lambda in the paper)")
    clip: Unit = Field(1e-4, description="share of the smallest, and of the largest, changes that do not differ")
    scope: Literal["tensor", "model"] = Field("model", description="what shares and ranks are of")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 8
    pass_depends_on: ClassVar = ("density",)
    neutral: ClassVar = {"density": 1.0, "clip": 0.0, "scale": 1.0}
    exempt: ClassVar = {
        **ScopedMethod.alike,
        "single scope=tensor": _LOWEST,
        "copies scope=tensor": _LOWEST,
        "float64": _LOWEST,
        "units": "scores are not proportional to changes: the hyperbolic tangent has a size of its own",
        "zero-weight": "entries of a model of weight 0 still compete",
    }

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        if num_elements == 0:
            return None
        models = range(len(p.density))
        low = num_elements - int(num_elements * self.clip)
        high = num_elements - max(0, int(num_elements * (1.0 - self.clip) - 1.0))
        ranks = [(model, low) for model in models] + [(model, high) for model in models]
        return find(magnitudes, ranks, num_elements, bits, _Search(p.density, num_elements, bits))

    def change(self, group: TensorGroup, p: Params, stats: Stats) -> "tuple[Tensor, float]":
        from mergetool.kernels.competition import Clip, balanced

        if not stats:  # it has no elements
            return group.deltas[0], 1.0
        clips = [Clip(low, high) for low, high in zip(stats["low"], stats["high"], strict=True)]
        spans = list(zip(stats["cut"], stats["top"], strict=True))
        return balanced(group.deltas, p.weight, clips, spans, group.scratch), 1.0

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        merged, _ = self.change(group, p, stats)
        assert group.base is not None
        return group.base.add_(merged, alpha=p.scale)
