"""Settings that the aligning methods share, as sections of their recipes. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1, strict=True)]
Weighting = Literal["none", "per-tensor"]
WEIGHTING_HELP = "`per-tensor`: every tensor counts alike; `none`: large tensors (embeddings) count more"


class _Strict(BaseModel):
    """One mapping of the recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Align(_Strict):
    """How C2M3 searches for the permutations."""

    mode: Literal["joint", "block"] = Field("joint", description="all models move together, or one at a time")
    init: Literal["identity", "barycenter"] = Field("identity", description="where the first start begins")
    anchor: Text | None = Field(None, description="model whose order the result takes; else one chosen by content")
    starts: Annotated[int, Field(ge=1, strict=True)] = Field(3, description="runs to choose the best of")
    releases: Annotated[int, Field(ge=0, strict=True)] = Field(
        40, description="how often two of three or more models are matched anew to the others, after the best run"
    )
    polish: bool = Field(True, strict=True, description="improve the rounded permutations by hard moves")
    iterations: Annotated[int, Field(ge=1, strict=True)] = Field(100, description="most Frank-Wolfe steps of a start")
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = Field(
        1e-6, description="stop when the gap is below this share of the objective"
    )
    weighting: Weighting = Field("none", description=WEIGHTING_HELP)
    permutations: Text | None = Field(None, description="take these from a permutations.safetensors, search nothing")

    @model_validator(mode="after")
    def _search_nothing(self) -> Any:
        searching = sorted(self.model_fields_set - {"permutations"})
        if self.permutations is not None and searching:
            raise ValueError(f"with `permutations` nothing is searched, so {', '.join(searching)} would have no effect")
        return self


Builder = Annotated[str, Field(strict=True, pattern=r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$")]
DATA_HELP = ".safetensors of inputs, named like the arguments of the network, or .jsonl of texts"
BUILDER_HELP = (
    "FILE.py:FUNCTION that builds the network, where transformers cannot from config.json; "
    "runs that file, so the run needs --trust-code"
)


class MatchBy(_Strict):
    """What tells which neurons of two networks are the same."""

    by: Literal["weights", "activations"] = Field(
        "weights", description="their weights, or what they say to the same inputs"
    )
    compare: Literal["correlation", "product"] = Field(
        "correlation", description="of activations: `product` counts loud neurons more"
    )
    data: Text | None = Field(None, description=DATA_HELP)
    network: Builder | None = Field(None, description=BUILDER_HELP)

    @model_validator(mode="after")
    def _data_for_a_reason(self) -> Any:
        defaults = MatchBy.model_fields
        others = sorted(name for name in defaults if name != "by" and getattr(self, name) != defaults[name].default)
        if self.by == "weights" and others:
            raise ValueError(f"weights are matched without data, so {', '.join(others)} would have no effect")
        if self.by == "activations" and self.data is None:
            raise ValueError("activations need data: some hundred inputs, no labels")
        return self


WEIGHTS = MatchBy()
MATCH_HELP = "what tells that neurons are the same: their weights, or their activations on data"


class Repair(_Strict):
    """Whether and how the merged network gets its parents' activations back."""

    mode: Literal["none", "bn-stats", "full"] = Field(
        "none", description="correct nothing, the statistics of batch norm layers, or every layer's output channels"
    )
    data: Text | None = Field(None, description=DATA_HELP)
    network: Builder | None = Field(None, description=BUILDER_HELP)

    @model_validator(mode="after")
    def _data_for_a_reason(self) -> Any:
        if self.mode == "none" and (self.data or self.network):
            raise ValueError("with mode none nothing is repaired, so data and network would have no effect")
        if self.mode != "none" and self.data is None:
            raise ValueError(f"mode {self.mode} needs data: some hundred inputs, no labels")
        return self


REPAIR_HELP = "give the merged network its parents' activations back; needs data"
