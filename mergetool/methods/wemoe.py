"""Merge everything but the MLPs, and mix those for each input: WEMoE, with a router that needs no data.

Attention, embeddings and norms of experts are alike enough to be added up: base + scale * sum of all task vectors. What
tasks need for themselves is in the MLPs, each of which is the base's plus the experts' changes of it, by shares. The
shares of an input are how probable its tasks are, told by the router of `mass` from what goes into the MLPs.

`load_bundle(path)` mixes, `load_bundle(path)(tasks=["sst2"], ...)` has the MLPs of one expert in the merged model,
`{source: out/wemoe, select: sst2}` is that in a recipe of any method. Classifiers as transformers saves them keep their
own heads.

Reference: Tang et al., Merging Multi-Task Models via Weight-Ensembling Mixture of Experts, ICML 2024,
https://arxiv.org/abs/2402.00433.
Differs from the paper: it trains a router for each MLP on unlabelled test data, which starts with the share `scale` for
every expert; these routers are told from the experts' directions, are one for all MLPs, and their shares add up to 1;
changes of MLPs are kept as a few directions (`rank`, `size`), where theirs are whole; whose head answers is found out.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import field_validator

from mergetool.methods.base import Field
from mergetool.methods.families.around import AroundMethod

if TYPE_CHECKING:
    from mergetool.bundle.options import Options


class Wemoe(AroundMethod):
    """A bundle around a merged model: what experts changed of its MLPs, router, heads"""

    method: Literal["wemoe"] = "wemoe"
    neutral: ClassVar = {"scale": 1.0}
    layers: Literal["mlp"] | tuple[str, ...] = Field(
        "mlp", description="what is mixed and not merged: tensors of MLPs, or globs on tensor names"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    def options(self) -> "Options":
        return self.around(self.layers)
