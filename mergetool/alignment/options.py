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
        20, description="how often two of three or more models are matched anew to the others, after the best run"
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


class Repair(_Strict):
    """Whether and how the merged network gets its parents' activations back."""

    mode: Literal["none", "bn-stats", "full"] = Field(
        "none", description="correct nothing, the statistics of batch norm layers, or every layer's output channels"
    )
    data: Text | None = Field(None, description=".safetensors of inputs, named like the arguments of the network")
    network: Annotated[str, Field(strict=True, pattern=r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        None,
        description="FILE.py:FUNCTION that builds the network, where transformers cannot from config.json; "
        "runs that file, so the run needs --trust-code",
    )

    @property
    def file(self) -> str | None:
        """The Python file of `network`."""
        return None if self.network is None else self.network.rpartition(":")[0]

    @model_validator(mode="after")
    def _data_for_a_reason(self) -> Any:
        if self.mode == "none" and (self.data or self.network):
            raise ValueError("with mode none nothing is repaired, so data and network would have no effect")
        if self.mode != "none" and self.data is None:
            raise ValueError(f"mode {self.mode} needs data: some hundred inputs, no labels")
        return self


REPAIR_HELP = "give the merged network its parents' activations back; needs data"
