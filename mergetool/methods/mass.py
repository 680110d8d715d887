"""Keep every expert as a few directions beside the base, and let each input find its own.

The result is no checkpoint but a bundle: the base, low-rank factors of every expert's changes (together about a third
larger than the matrices they change, however many experts there are), their heads, and a router. At run time the
features of an input are compared with the directions of each task, and the input is answered by the experts of the
nearest ones, merged on the fly; nobody has to say which task it belongs to. Nothing is trained and no data are needed.

`mergetool.load_bundle` opens it, `mergetool route` answers rows of a file, by any number of threads. Classifiers as
transformers saves them (`...ForSequenceClassification`, token, image, audio and video classification, question
answering) are named as any model, `reviews: ./reviews`: an expert's own head, its pooler, its padding rule and its
labels are found in its folder and kept whole, and `base` may be with or without a head. A head that was saved apart is
given with its model: `{source: ./sst2, head: {weights: ./sst2/head.safetensors, pool: mean}}`. Language models have
none. Experts may be LoRA adapters, `{adapter: ./lora}`, which are kept by their own factors.

`router: {kind: arrow}` mixes all experts instead of choosing a group: at every matrix of a linear layer a token x gives
the `top_k` experts with the largest |x . v| shares by a softmax over `temperature`, where v is the top right singular
vector of the expert's change (for LoRA, of B A). With `per: sequence` an input has one set of shares everywhere, from
its pooled features. What is no such matrix is that of all tasks as one group.

Reference: Crisostomi et al., MASS: MoErging through Adaptive Subspace Selection, https://arxiv.org/abs/2504.05342;
Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, https://arxiv.org/abs/2405.11157
(Arrow).
Differs from the paper: the router reads what goes into the output projections of all attention blocks of the base
(`layers: auto`), where theirs reads one matrix of a merged model; the share of a feature that a task's directions
explain is turned into a likelihood, which is fair between tasks of different rank and keeps how sure the router is,
where theirs standardises residuals (`norm: l2`, `mode: topk`); a sample's heads are compared by joint log-probability
instead of raw scores; the merge of a group of tasks is never materialised per sample; redundant tasks are left out of
the first pass only where that uses merged weights; directions of least energy are left out where factors would take
more than `size` of the base. `mergetool calibrate` corrects a router with a few rows whose tasks are known.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from mergetool.bundle.manifest import Features, HeadRule, Per
from mergetool.methods.base import Field, Finite
from mergetool.methods.families.bundle import FactorsMethod
from mergetool.methods.families.nearest import NearestRouter

if TYPE_CHECKING:
    from mergetool.bundle.options import Options, RouterOptions


class RouterSettings(NearestRouter):
    """How tasks are chosen for an input."""

    kind: Literal["mass", "arrow"] = Field(
        "mass",
        description="choose a few tasks for an input and merge them (mass), or give all experts shares by their first "
        "directions (arrow)",
    )
    per: Per | None = Field(
        None, description="whose shares they are (arrow only): every token's at every matrix (token), or an input's"
    )
    features: Features = Field(
        "base", description="what the first pass runs: the base, or the merge of all experts (takes more space)"
    )
    top_k: Annotated[int, Field(strict=True, ge=1)] = Field(3, description="at most so many tasks for one input")
    redundancy: Annotated[Finite, Field(ge=-1, le=1)] | None = Field(
        None, description="leave tasks out of the merged first pass whose cosine with an earlier one exceeds this (0.3)"
    )

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> "RouterSettings":
        common = ("features", "norm", "mode", "threshold", "redundancy", "unknown", "early", "rank")
        idle = ("per",) if self.kind == "mass" else common
        fields = type(self).model_fields
        written = [field for field in idle if getattr(self, field) != fields[field].default]
        if written:
            raise ValueError(f"`{written[0]}` would have no effect with `kind: {self.kind}`: leave it out")
        if self.redundancy is not None and self.features == "base":
            raise ValueError("without `features: merged` nothing is merged, so this would have no effect")
        return self

    def options(self) -> "RouterOptions":
        """As a bundle's build sees it."""
        from mergetool.bundle.options import RouterOptions

        router = self.model_dump(exclude={"kind"})
        if self.redundancy is None:
            router["redundancy"] = 0.3
        if self.kind == "arrow":
            router |= {"norm": "arrow", "threshold": 0.0, "per": self.per or "token"}
        return RouterOptions(**router)


class Mass(FactorsMethod):
    """A bundle: base, factors, heads, router"""

    method: Literal["mass"] = "mass"
    router: RouterSettings = Field(RouterSettings(), description="how tasks are chosen for an input")
    heads: HeadRule = Field(
        "joint",
        description="whose head answers: best probability (joint: times coefficient), or best or mean raw score",
    )

    @model_validator(mode="after")
    def _has_matrices(self) -> "Mass":
        if self.filter == "none":
            raise ValueError("without matrices there is nothing to route by (filter)")
        return self

    def options(self) -> "Options":
        return replace(self.kept("mass"), router=self.router.options(), heads=self.heads)
