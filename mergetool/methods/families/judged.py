"""Searches whose candidates are judged by their answers to items of real tasks, most of them by a few."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from mergetool.evaluate.options import TaskOptions
from mergetool.methods.base import Field, Finite
from mergetool.methods.families.search import SearchMethod

if TYPE_CHECKING:
    from mergetool.search.space import Value

Count = Annotated[int, Field(strict=True, ge=1)]
IN_CACHE = "cache"
"""Answers of other models that the response cache holds, in place of a file's name."""


def as_tuple(value: Any) -> Any:
    """A list of a recipe as methods hold it."""
    return tuple(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    return {key: as_tuple(part) for key, part in value.items()} if isinstance(value, dict) else value


Algorithm = Literal["cma-es", "ga", "nsga2", "tpe", "random", "sobol", "grid", "greedy"]


class SearchOptions(BaseModel):
    """How candidates are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Algorithm = Field(
        "cma-es",
        description="who proposes candidates; nsga2 treats every task as an objective of its own; grid and greedy "
        "(soup) end by themselves, whatever `generations` says",
    )
    population: Count = Field(16, description="candidates of one generation")
    generations: Count = Field(10, description="generations, the first included")
    rerank: Count = Field(5, description="how many of the best are compared on all search items")
    report: Annotated[Finite, Field(gt=0, lt=1)] = Field(
        0.5, description="share of each task's items that takes no part in the search and serves the final report"
    )
    batch_size: Count = Field(32, description="sequences that the model runs at once")

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


class JudgedSearch(SearchMethod):
    """A search by answers: tasks that judge, who proposes candidates, and how few items tell a score."""

    tasks: Annotated[tuple[TaskOptions, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        description="tasks of lm-eval that judge the candidates", examples=[[{"name": "arc_easy"}]]
    )
    search: SearchOptions = Field(SearchOptions(), description="how candidates are found")
    estimator: EstimatorOptions = Field(EstimatorOptions(), description="how few items tell a candidate's score")

    def files(self) -> Mapping[str, str]:
        path = self.estimator.responses
        return {} if path in (None, IN_CACHE) else {"merge.estimator.responses": str(path)}

    def penalty(self, values: "Sequence[Value]") -> float:
        """What a candidate's score loses by its numbers alone."""
        return 0.0
