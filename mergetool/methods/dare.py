"""Drop random entries of task vectors, rescale the rest, merge.

Most of what fine-tuning changes is redundant: entries of a task vector can be dropped at random, and the rest scaled
up so that its expectation stays, with little loss. Sparse task vectors then overlap less. `dare-linear` adds them up;
`dare-ties` lets them vote on signs first and adds up those that agree.

Which entries are dropped depends on the seed, the tensor's name, the model's name and the place of the entry, and on
nothing else: the same on any machine, for any number of workers, and after a resume.

Reference: Yu et al., Language models are super Mario, ICML 2024, https://arxiv.org/abs/2311.03099, section 3.
Differs from the paper: `density` is the share that is kept (the paper's p is the share dropped); `rescale: l1` restores
each task vector's L1 norm instead, as mergekit does; draws have a resolution of 2^-16, and the factor matches it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Params, Stats, TensorGroup
from mergetool.methods.families.sparse import MEAN, SparseMethod

if TYPE_CHECKING:
    from torch import Tensor


class _Dare(SparseMethod):
    """What both members of the family share: dropping, rescaling."""

    rescale: Literal["1/p", "l1", "none"] = Field(  # type: ignore[assignment]  # one word more
        "1/p", description="after dropping: divide by the share kept, restore the L1 norm, or leave as it is"
    )
    pass_depends_on: ClassVar = ("density",)
    exempt: ClassVar = {
        "seed-free": "draws which entries are kept",
        "tied": "draws are keyed by the tensor's name, so two stored copies of a tensor get two draws",
    }

    def thin(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        for name, delta, density in zip(group.names, group.deltas, p.density, strict=True):
            _drop(group, name, delta, density)

    def own_factors(self, p: Params) -> Sequence[float]:
        from mergetool.kernels.rng import resolved

        return [1.0 / resolved(density) if self.rescale == "1/p" else 1.0 for density in p.density]


class DareLinear(_Dare):
    """`base + scale * sum(w_i drop(x_i - base))`"""

    method: Literal["dare-linear"] = "dare-linear"


class DareTies(_Dare):
    """`base + scale * sum of the dropped task vectors that agree with the elected sign`"""

    method: Literal["dare-ties"] = "dare-ties"
    normalize: bool = Field(False, strict=True, description=MEAN)
    votes: ClassVar = True


def _drop(group: TensorGroup, name: str, delta: "Tensor", density: float) -> "Tensor":
    """Zero, in place, the entries of one model's task vector that are to go."""
    from mergetool.kernels.rng import keep_mask, stream_key

    if density == 1.0:
        return delta
    key = stream_key(group.seed, group.name, name, "dare")
    mask = group.scratch("sign")  # where a vote keeps signs, once all masks are done with: one temporary less
    return delta.mul_(keep_mask(key, group.start, density, mask, group.scratch))
