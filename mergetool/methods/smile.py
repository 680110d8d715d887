"""Give every token, at every linear layer, the experts whose directions it has most of: SMILE, without training.

At a matrix of a linear layer an expert is its own low-rank change, and its gate the first right singular vectors V of
that. A token x has |V^T x| of the expert; of the `top_k` experts with the most, a softmax makes shares, which also its
bias has. So parts of one input may go to different experts, and no two layers need agree. The result is a bundle, as
that of `mass`, and needs no data; it also serves language models.

`load_bundle(path)` mixes, `load_bundle(path)(tasks=["sst2"], ...)` is one expert. Whose head answers is told for the
whole input, by the router of `mass`. Experts come and go by `mergetool bundle add` and `remove`.

Reference: Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation
Models, https://arxiv.org/abs/2408.10174.
Differs from the paper: experts share the space (`rank: auto`, `size`), where theirs all keep one rank; where an expert
keeps fewer directions than its gate is to have, these are its gate; norms, embeddings and what else is no linear layer
are those of all experts merged as one group of `mass`, where theirs are of the base; whose head answers is found out.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict

from mergetool.methods.base import Field, Finite
from mergetool.methods.families.bundle import RoutedMethod
from mergetool.methods.families.nearest import SharesRouter

if TYPE_CHECKING:
    from mergetool.bundle.options import Options


class GateSettings(BaseModel):
    """How a matrix gives a token its shares of the experts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directions: Annotated[int, Field(strict=True, ge=1)] = Field(
        16, description="how many of an expert's directions a token is compared with"
    )
    top_k: Annotated[int, Field(strict=True, ge=1)] = Field(1, description="at most so many experts for a token")
    temperature: Annotated[Finite, Field(gt=0)] = Field(1.0, description="divides lengths before the softmax")


class Smile(RoutedMethod):
    """A bundle: base, factors, a gate at every matrix, heads"""

    method: Literal["smile"] = "smile"
    gate: GateSettings = Field(GateSettings(), description="which experts a token has at a matrix")
    router: SharesRouter = Field(SharesRouter(), description="whose heads an input asks")

    def options(self) -> "Options":
        from dataclasses import replace

        from mergetool.bundle.manifest import Gate

        router = replace(self.router.options(), per="token", gate=Gate(**self.gate.model_dump()))
        return replace(self.kept("smile"), router=router, heads=self.heads)
