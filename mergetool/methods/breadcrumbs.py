"""Keep the middle of each task vector: neither its few largest entries nor the many small ones.

The largest changes of a fine-tune are outliers that disturb other tasks, the smallest are noise. Of each task vector,
tensor by tensor, the largest `gamma` are dropped, the next largest `density` are kept, and the rest is dropped.
`breadcrumbs` adds up what is left; `breadcrumbs-ties` lets it vote on signs first and adds up those that agree.

Reference: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, https://arxiv.org/abs/2312.06795, section 3. `density`
and `gamma` are those of the authors' code for large vision models, where `scale` is 0.4.
Differs from the paper: ranks are those of a whole tensor, as the paper says (the authors' code has them row by row); at
least one entry of a tensor is kept. Where `gamma` and `density` are more than the whole, fewer large ones go. Voting,
and `rescale: l1`, are mergekit's.
"""

from typing import ClassVar, Literal

from mergetool.methods.base import Field, Fraction, Params, PerModel, Unit
from mergetool.methods.families.sparse import MEAN
from mergetool.methods.families.trimmed import TrimmedMethod


class _Breadcrumbs(TrimmedMethod):
    """What both members of the family share: the band that is kept."""

    density: PerModel[Fraction] = Field(0.2, description="share of each task vector that is kept")
    gamma: PerModel[Unit] = Field(0.1, description="share of each task vector that is dropped for being largest")
    pass_depends_on: ClassVar = ("density", "gamma")

    def bands(self, p: Params, num_elements: int) -> list[tuple[int, int]]:
        kept_ranks = []
        for density, gamma in zip(p.density, p.gamma, strict=True):
            kept = max(1, int(density * num_elements))
            dropped = min(int(gamma * num_elements), num_elements - kept)
            kept_ranks.append((dropped + 1, dropped + kept))
        return kept_ranks


class Breadcrumbs(_Breadcrumbs):
    """`base + scale * sum(w_i middle(x_i - base))`"""

    method: Literal["breadcrumbs"] = "breadcrumbs"


class BreadcrumbsTies(_Breadcrumbs):
    """`base + scale * sum of the middles of task vectors that agree with the elected sign`"""

    method: Literal["breadcrumbs-ties"] = "breadcrumbs-ties"
    normalize: bool = Field(False, strict=True, description=MEAN)
    votes: ClassVar = True
