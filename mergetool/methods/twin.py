"""Serve the sum of all experts, and add to it what is an input's own: Twin-Merging, with a router that needs no data.

What experts have in common is merged, base + scale * sum of all task vectors, and that is the base of the bundle. What
each of them differs by from it is its own, and kept as a few directions. The router of `mass` tells how probable every
task is for an input, and the input is answered by the merged model plus the experts' own parts, each with its
probability. So an input that belongs to no task for sure has a bit of several, and at worst the merged model.

`load_bundle(path)` mixes, `load_bundle(path)(tasks=["sst2"], ...)` is one expert, `{source: out/twin, select: sst2}` is
it in a recipe of any method. Classifiers as transformers saves them keep their own heads.

Reference: Lu et al., Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging, NeurIPS 2024,
https://arxiv.org/abs/2406.15479.
Differs from the paper: their router is a small network, trained on validation data of all tasks on the last layer of
the merged model, where this one is told from the experts' directions and reads what goes into its attention outputs;
experts share the space (`rank: auto`), where each of theirs keeps a tenth of the directions (`rank: 0.1`); biases and
convolutions are kept, too; what is no linear layer (norms, embeddings, convolutions) has no shares, but is
that of all tasks; whose head answers is found out.
"""

from typing import TYPE_CHECKING, Literal

from mergetool.methods.families.around import AroundMethod

if TYPE_CHECKING:
    from mergetool.bundle.options import Options


class Twin(AroundMethod):
    """A bundle around a merged model: what experts differ by from it, router, heads"""

    method: Literal["twin"] = "twin"

    def options(self) -> "Options":
        return self.around("all")
