"""Join the units of several networks, also those of one network, until one network's worth is left (ZipIt!).

Networks for different tasks have features in common and features of their own. Layer by layer the two units that are
most alike are joined, whichever models they are of, then the next two, until as many are left as one network has. A
joint unit is the mean of its members, and what read a member reads the joint unit. Unlike a permutation, which must
give every unit a partner, this joins what is twice in one network to make room for what is only in the other.

What is alike is told by activations on data of all tasks (`match`), as in the paper, or by weights. The networks are
joined whole; heads of different tasks cannot be kept apart in one checkpoint, so the classifier is averaged: merge
models of the same classes, or copy one head with an override. Units of attention heads and residual streams with signs
stay in their order.

Reference: Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024,
https://arxiv.org/abs/2305.03053.
Differs from the paper: no partial zipping, whose result is no checkpoint of one network; joint units are not made less
alike than their least alike members (`alpha` 1, the authors' code has 0.3), or a third model could not follow; `within`
is one number for all models, and a joint unit is of all models that its members are of (the authors' code counts by
the first); weights can tell what is alike, without data.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Unit
from mergetool.methods.families.mapping import MappingMethod

if TYPE_CHECKING:
    from mergetool.alignment.maps import Evidence, UnitMap


class ZipIt(MappingMethod):
    """Greedy joining of correlated units."""

    method: Literal["zipit"] = "zipit"
    alpha: Unit = Field(1.0, description="how much less alike a joint unit counts than its least alike members")
    within: Unit = Field(0.125, description="share of the joins that may bring units of one model together")
    exempt: ClassVar = {"order": "units come in the order of the first model's"}

    def maps(self, evidence: "Evidence", space: str) -> "Sequence[UnitMap]":
        import numpy as np
        import torch

        from mergetool.alignment.maps import UnitMap
        from mergetool.kernels.zipping import zip_units

        profiles = evidence.of(space)
        units = torch.cat([profile.double() for profile in profiles])
        norms = units.norm(dim=1, keepdim=True)
        units = torch.where(norms > 0, units / norms, 0.0)
        alike = units @ units.T + ((norms == 0) & (norms == 0).T)  # units that say nothing are alike
        count, size = len(profiles), len(profiles[0])
        owners = np.repeat(np.arange(count), size)
        labels = torch.from_numpy(zip_units(alike.cpu().numpy(), owners, size, self.alpha, self.within))
        joined = torch.nn.functional.one_hot(labels, size).double()
        share = joined.T / joined.sum(dim=0).unsqueeze(1)
        return [
            UnitMap(count * share[:, k * size : (k + 1) * size].clone(), joined[k * size : (k + 1) * size].clone())
            for k in range(count)
        ]
