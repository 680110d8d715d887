"""Make one mixture of experts out of several dense models.

Every layer of the result holds the MLPs of all experts side by side, and a gate that sends each token to some of them;
attention, embeddings and norms are those of the base. Nothing is trained: the row of a gate that calls an expert is the
direction in which the base's hidden states lie for prompts that belong to it (`prompts`), less that of prompts that do
not (`avoid`). Experts are named like models (or like `base`); one that is another's model says so:
`{clone: {model: math, prompts: [...]}}`.

`gate` says where rows come from: `hidden`, the hidden state of the last token that goes into each layer; `hidden-avg`,
the mean over all tokens; `embedding`, the sum of the tokens' embeddings, the same in every layer (needs no network);
`random` and `uniform-random`, keyed draws, for training (normal, or as new linear layers begin); `uniform`, zeros:
every expert counts alike. All rows of the first three have length 1. Hidden states are measured in float32, and layer
by layer: one layer of the base is in memory at a time.

With experts that are copies of the base the result computes what the base does, since the chosen gates add up to 1
(in `qwen2-moe` and `deepseek`: without a shared expert).

Reference: none; mergekit's `mergekit-moe` made it known (https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md).
Differs from the paper: there is none. From mergekit-moe: hidden states in float32, not bfloat16; the mean of
`hidden-avg` is over the tokens of prompts, not over padding; a window of attention is kept; a shared expert is not
compulsory for `qwen2-moe`: without one, it is small and says nothing.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from mergetool.alignment.models import Headers
from mergetool.checkpoints.mixtures import ends_expert
from mergetool.methods.base import Field, Finite, Method, Params, Positive, Scheduled, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor

Text = Annotated[str, Field(min_length=1, strict=True)]
_MEASURED = ("hidden", "hidden-avg")
_TOKENS = 4096
"""Of prompts that are looked at together, in round numbers."""


class ExpertSettings(BaseModel):
    """One expert."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Text | None = Field(None, description="whose MLPs it has, if it is not called like that model")
    prompts: tuple[Text, ...] = Field((), description="texts that should be sent to it")
    avoid: tuple[Text, ...] = Field((), description="texts that should not")


def _named(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class _Expert(TensorMethod):
    """What is done to a matrix of an expert."""

    noise: Scheduled[Positive] = 0.0
    scale: Scheduled[Finite] = 1.0
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"
    mixes: ClassVar = False
    buffers: ClassVar = 3

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return "expert"

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        (model,) = group.models
        if p.noise:
            from mergetool.kernels.rng import normal, stream_key

            drawn = normal(stream_key(group.seed, group.name, "noise"), group.start, model)
            model.add_(drawn, alpha=p.noise)
        return model.mul_(p.scale) if p.scale != 1.0 and ends_expert(group.name) else model


class MixtureOfExperts(Method):
    """MLPs of all experts side by side, and gates between them."""

    method: Literal["moe"] = "moe"
    target: Literal["auto", "mixtral", "qwen2-moe", "qwen3-moe", "deepseek"] = Field(
        "auto", description="the family of mixtures; auto: the one that fits the base, with or without a shared expert"
    )
    experts: dict[str, ExpertSettings] = Field(
        min_length=1,
        description="NAME: {prompts: [...], avoid: [...], model: MODEL}, in order",
        examples=[{"first": {"prompts": ["Solve this equation"]}, "second": {"prompts": ["def main():"]}}],
    )
    gate: Literal["hidden", "hidden-avg", "embedding", "random", "uniform-random", "uniform"] = Field(
        "hidden", description="where the rows of gates come from"
    )
    experts_per_token: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="how many experts each token is sent to (2; all of them with `gate: uniform`)"
    )
    shared: Annotated[ExpertSettings, BeforeValidator(_named, json_schema_input_type=str | ExpertSettings)] | None = (
        Field(None, description="an expert that every token goes through: a model, or {model: MODEL, prompts: [...]}")
    )
    noise: Scheduled[Positive] = Field(0.0, description="standard deviation of noise added to experts, for training")
    scale: Scheduled[Finite] = Field(1.0, description="factor on what experts say (their last matrices)")
    needs_base: ClassVar = "required"
    arranges: ClassVar = True

    def stages(self) -> tuple[str, ...]:
        return ("gates", "merge")

    def kernel(self) -> TensorMethod:
        return _Expert(noise=self.noise, scale=self.scale)

    @property
    def measured(self) -> bool:
        """Whether gates are measured in the network."""
        return self.gate in _MEASURED

    @property
    def needs_prompts(self) -> bool:
        return self.measured or self.gate == "embedding"

    def chosen(self, num_experts: int) -> int:
        """How many experts each token is sent to."""
        return self.experts_per_token or (num_experts if self.gate == "uniform" else min(2, num_experts))

    def fit_memory(self, headers: Headers, threads: int) -> int:
        if not self.measured or "hidden_size" not in headers.config:
            return 0
        hidden, inner = (int(headers.config[key]) for key in ("hidden_size", "intermediate_size"))
        return 4 * (3 * hidden * inner + 4 * hidden * hidden + _TOKENS * (3 * inner + 12 * hidden))
