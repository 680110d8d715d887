"""Search the settings of any other method, judging candidates by their answers to a few items of real tasks.

Any number in `inner` may be a range, `{search: [low, high]}`. Candidates are merged in memory, one after the other,
into a model that stands ready, and lm-eval asks it the items of `tasks`. Asking all of them would take far too long, so
the models answer everything first, and from that a small subset is chosen (extract); from then on a candidate answers
only the subset, and what it would score on all items is estimated (estimate), and an optimiser proposes the next ones
(evolve). The best few are
then compared on all search items, and the winner is scored once on items that took no part in the search.

Beside the result lies `NAME.search/`: the journal, a report, and the winner as a plain recipe, which makes the same
bytes again without searching; `parent.yaml` gives the best of the models instead. The journal keeps every answer by
candidate and item: a killed search goes on where it was, and one with more generations, another population or another
estimator (with --overwrite) asks only what is new.

Reference: Mencattini et al., MERGE3: Efficient Evolutionary Merging on Consumer-grade GPUs, ICML 2025,
https://arxiv.org/abs/2502.10436.
Differs from the paper: the default estimate is the subset's weighted mean, which did as well for fewer items wherever
it was tried, for no merges calibrate it. The item response model (`kind: gmp-irt`, the paper's) learns from answers how
hard each item is and what it tells about a model; it is fitted to answers of the parents and of random merges of them,
or, as theirs, to those of many other models (`responses`); abilities are MAP estimates; the blend's weight is
cross-fitted; where it does not beat a plain mean on held-out merges, the mean is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from mergetool.methods.base import Field, Finite
from mergetool.methods.families.genes import InnerMethod
from mergetool.methods.families.judged import Count, JudgedSearch, SearchOptions

if TYPE_CHECKING:
    from mergetool.search.space import SearchSpace, Value


class NumberSearch(SearchOptions):
    """How numbers are found."""

    groups: Count = Field(1, description="groups of layers: genes for each setting along depth")
    penalty: Annotated[Finite, Field(ge=0)] = Field(
        0.0, description="what the mean size of a candidate's numbers takes off its score, times this (LoRAHub: 0.05)"
    )

    @model_validator(mode="after")
    def _one_objective_is_penalised(self) -> "NumberSearch":
        if self.penalty and self.algorithm == "nsga2":
            raise ValueError("`penalty` is taken off one score, and `algorithm: nsga2` has several: remove one of both")
        return self


class Merge3(JudgedSearch):
    """Evolve the settings of another method"""

    method: Literal["merge3"] = "merge3"
    inner: InnerMethod = Field(
        description="the method whose settings are searched; any number may be a range",
        examples=[{"method": "task-arithmetic", "weight": {"search": [0.0, 1.5]}}],
    )
    search: NumberSearch = Field(NumberSearch(), description="how candidates are found")
    needs_base: ClassVar = "optional"

    @model_validator(mode="after")
    def _grids_have_steps(self) -> "Merge3":
        endless = [place for place, span in self.inner.ranges().items() if span.search and span.step is None]
        if self.search.algorithm == "grid" and endless:
            place = ".".join(map(str, endless[0]))
            raise ValueError(f"inner.{place} has any number of values: with `algorithm: grid` give it a `step`")
        return self

    def penalty(self, values: "Sequence[Value]") -> float:
        import numpy as np

        sizes = [abs(each) for each in values if isinstance(each, int | float)]
        return self.search.penalty * float(np.mean(sizes)) if sizes else 0.0

    def space(self, models: Sequence[str]) -> "SearchSpace":
        from mergetool.search.space import SearchSpace

        return SearchSpace(self.inner.genes(models, self.search.groups))

    def candidate(self, values: "Sequence[Value]", models: Sequence[str]) -> dict[str, Any]:
        return self.inner.filled(values, models, self.search.groups)
