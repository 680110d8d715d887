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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from mergetool.evaluate.options import TaskOptions
from mergetool.methods.base import Field, Finite
from mergetool.methods.families.genes import InnerMethod
from mergetool.methods.families.search import SearchMethod

if TYPE_CHECKING:
    from mergetool.search.space import SearchSpace, Value

Count = Annotated[int, Field(strict=True, ge=1)]
IN_CACHE = "cache"
"""Answers of other models that the response cache holds, in place of a file's name."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    return {key: _as_tuple(part) for key, part in value.items()} if isinstance(value, dict) else value


class SearchOptions(BaseModel):
    """How candidates are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["cma-es", "ga", "nsga2", "tpe", "random", "sobol", "grid", "greedy"] = Field(
        "cma-es",
        description="who proposes candidates; nsga2 treats every task as an objective of its own; grid and greedy "
        "(soup) end by themselves, whatever `generations` says",
    )
    population: Count = Field(16, description="candidates of one generation")
    generations: Count = Field(10, description="generations, the first included")
    groups: Count = Field(1, description="groups of layers: genes for each setting along depth")
    rerank: Count = Field(5, description="how many of the best are compared on all search items")
    report: Annotated[Finite, Field(gt=0, lt=1)] = Field(
        0.5, description="share of each task's items that takes no part in the search and serves the final report"
    )
    batch_size: Count = Field(32, description="sequences that the model runs at once")
    penalty: Annotated[Finite, Field(ge=0)] = Field(
        0.0, description="what the mean size of a candidate's numbers takes off its score, times this (LoRAHub: 0.05)"
    )

    @model_validator(mode="after")
    def _one_objective_is_penalised(self) -> "SearchOptions":
        if self.penalty and self.algorithm == "nsga2":
            raise ValueError("`penalty` is taken off one score, and `algorithm: nsga2` has several: remove one of both")
        return self

    @property
    def generations_matter(self) -> bool:
        """Whether the search goes on as long as it is told to."""
        return self.algorithm not in ("grid", "greedy")


class EstimatorOptions(BaseModel):
    """How a candidate's score on all search items is told from a few."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["full", "mean", "weighted", "p-irt", "gp-irt", "mp-irt", "gmp-irt"] = Field(
        "weighted",
        description="ask all search items (full), or a subset: its mean, its weighted mean, item response theory "
        "(p-irt; mp-irt with abilities that merges of the models can have), or a blend of both (gp-irt, gmp-irt)",
    )
    items: Count = Field(50, description="items of each task in the subset")
    subset: Literal["stratified", "random", "irt", "correctness"] = Field(
        "stratified",
        description="one item of each difficulty, any items, or the centres of clusters (of fitted items, of answers)",
    )
    ids: Annotated[dict[str, tuple[int, ...]] | None, BeforeValidator(_tuples)] = Field(
        None, description="the subset itself instead: item numbers by task"
    )
    responses: Annotated[str, Field(min_length=1, strict=True)] | None = Field(
        None,
        description="JSON lines of what other models answered, or `cache`, what --cache has kept of earlier searches; "
        "with it `kind` is gmp-irt where none is given, and no merges calibrate",
    )
    calibration: Annotated[int, Field(strict=True, ge=0)] | None = Field(
        None,
        description="random merges that answer all search items first; else 16 for item response theory without "
        "`responses`, or 0",
    )
    dimensions: Literal["auto"] | Count = Field("auto", description="dimensions of ability; auto: by held-out models")
    span: Literal["affine", "linear"] = Field(
        "affine", description="where merges are thought to lie: around the base (as task vectors add up), or around 0"
    )
    signal: Literal["accuracy", "soft"] = Field(
        "accuracy", description="what guides the search: the metric, or the probability of the right choice"
    )
    guard: bool = Field(
        True,
        strict=True,
        description="use the weighted mean where item response theory does no better on held-out merges",
    )

    @model_validator(mode="before")
    @classmethod
    def _irt_where_answers_are_known(cls, given: Any) -> Any:
        known = isinstance(given, dict) and given.get("responses") is not None
        return {"kind": "gmp-irt", **given} if known else given

    @model_validator(mode="after")
    def _responses_have_a_use(self) -> "EstimatorOptions":
        if self.responses is not None and not self.needs_answers:
            raise ValueError("`responses` would have no effect: of other models' answers nothing is learnt here")
        return self

    @property
    def num_calibration(self) -> int:
        """Random merges that answer all search items."""
        if self.calibration is not None:
            return self.calibration
        return 16 if self.kind.endswith("irt") and self.responses is None else 0

    @property
    def needs_answers(self) -> bool:
        """Whether models must answer all search items before a subset can be chosen."""
        return self.kind != "full" and (self.kind.endswith("irt") or (self.subset != "random" and self.ids is None))


class Merge3(SearchMethod):
    """Evolve the settings of another method"""

    method: Literal["merge3"] = "merge3"
    inner: InnerMethod = Field(
        description="the method whose settings are searched; any number may be a range",
        examples=[{"method": "task-arithmetic", "weight": {"search": [0.0, 1.5]}}],
    )
    tasks: Annotated[tuple[TaskOptions, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        description="tasks of lm-eval that judge the candidates", examples=[[{"name": "arc_easy"}]]
    )
    search: SearchOptions = Field(SearchOptions(), description="how candidates are found")
    estimator: EstimatorOptions = Field(EstimatorOptions(), description="how few items tell a candidate's score")
    needs_base: ClassVar = "optional"

    @model_validator(mode="after")
    def _grids_have_steps(self) -> "Merge3":
        endless = [place for place, span in self.inner.ranges().items() if span.search and span.step is None]
        if self.search.algorithm == "grid" and endless:
            place = ".".join(map(str, endless[0]))
            raise ValueError(f"inner.{place} has any number of values: with `algorithm: grid` give it a `step`")
        return self

    def files(self) -> Mapping[str, str]:
        path = self.estimator.responses
        return {} if path in (None, IN_CACHE) else {"merge.estimator.responses": str(path)}

    def space(self, models: Sequence[str]) -> "SearchSpace":
        from mergetool.search.space import SearchSpace

        return SearchSpace(self.inner.genes(models, self.search.groups))

    def candidate(self, values: "Sequence[Value]", models: Sequence[str]) -> dict[str, Any]:
        return self.inner.filled(values, models, self.search.groups)
