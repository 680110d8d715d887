"""Carry each model's units to those of the first by optimal transport, then merge: also models of other widths.

Layer by layer, every unit of a model is moved to units of the first model that are like it, at the least total cost.
Between networks of one width this is a permutation. Between others a unit may be shared out: a layer of 512 units
comes to one of 256 as pairs, and the result has the shapes of the first model. A unit of the result takes the mean of
what arrives there; what read a unit reads those it was moved to, by shares. So a network whose units were split in two
is carried back onto the one it was made of.

What tells units apart is their incoming weights, from the first layer on, or activations (`match`; of models of one
width). With `smoothing` the transport is soft. `masses: outgoing` weighs units by what reads them; then the transport
is a linear program, which takes minutes for layers of a thousand units. Units of attention heads and residual streams
with signs stay in their order, and must be as many in all models.

Reference: Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, https://arxiv.org/abs/1910.05653.
Differs from the paper: what reads a unit is divided by the shares of that unit, not of the units it arrives at (the
same for equal widths; it makes split units exact); biases are carried, and tell units apart, too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Positive
from mergetool.methods.families.mapping import MappingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.alignment.maps import Evidence, UnitMap


class OTFusion(MappingMethod):
    """Transport of units to those of the first model."""

    method: Literal["ot-fusion"] = "ot-fusion"
    smoothing: Positive = Field(0.0, description="0: exact; above: how soft, as a share of the mean cost (try 0.01)")
    masses: Literal["uniform", "outgoing"] = Field(
        "uniform", description="what units weigh: alike, or by what reads them"
    )
    resizes: ClassVar = True
    exempt: ClassVar = {"order": "the first model is the one that the others are carried to"}

    def maps(self, evidence: "Evidence", space: str) -> "Sequence[UnitMap]":
        import torch

        from mergetool.alignment.maps import UnitMap
        from mergetool.kernels.transport import transport

        profiles = evidence.of(space)
        masses = [self._masses(evidence, k, space, len(profile)) for k, profile in enumerate(profiles)]
        first, found = profiles[0].double().cpu(), []
        for profile, mass in zip(profiles, masses, strict=True):
            cost = torch.cdist(profile.double().cpu(), first, compute_mode="donot_use_mm_for_euclid_dist")
            plan = torch.from_numpy(transport(cost.numpy(), mass.numpy(), masses[0].numpy(), self.smoothing))
            arriving, leaving = plan.sum(dim=0), plan.sum(dim=1)
            gather, spread = plan / arriving.clamp_min(1e-300), plan / leaving.clamp_min(1e-300)[:, None]
            found.append(UnitMap(gather.T.contiguous(), spread))
        return found

    def _masses(self, evidence: "Evidence", model: int, space: str, count: int) -> "Tensor":
        import torch

        masses = evidence.read(model, space) if self.masses == "outgoing" else torch.zeros(count, dtype=torch.float64)
        masses = masses if bool(masses.sum() > 0) else torch.ones_like(masses)
        return masses / masses.sum()
