"""Drop random entries of task vectors, small ones more often than large ones, rescale the rest, merge.

Like DARE, but the chance of an entry to be kept grows with its rank among the magnitudes of its row: in a straight line
from `density - epsilon` for the smallest to `density + epsilon` for the largest. Each entry that is kept is divided by
its own chance, so that expectations stay. `della` then lets task vectors vote on signs and averages those that agree;
`della-linear` adds them up. Draws are keyed as in DARE: the same on any machine and after a resume.

Reference: Deep et al., DELLA-Merging, 2024, https://arxiv.org/abs/2406.11617, section 3. `density` and `epsilon` are
those of the authors' example.
Differs from the paper: `density` is the share that is kept (the paper's p is the share dropped); a row is everything
that belongs to one index of the first axis, a tensor of one axis is one row; equal magnitudes are ranked by their
places, and the only entry of a row has the chance `density`. `rescale: l1` restores each task vector's L1 norm instead,
as mergekit does; draws have a resolution of 2^-16, and the factors match it.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.methods.base import Field, Fraction, Params, PerModel, Stats, TensorGroup, Unit
from mergetool.methods.families.sparse import MEAN, SparseMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESOLUTION = 1 << 16


class _Della(SparseMethod):
    """What both members of the family share: dropping by rank, rescaling."""

    density: PerModel[Fraction] = Field(0.7, description="share of each task vector that is kept; 1 keeps all of it")
    epsilon: PerModel[Unit] = Field(
        0.07, description="how much likelier than `density` the largest entry of a row is kept, and the smallest less"
    )
    rescale: Literal["1/p", "l1", "none"] = Field(  # type: ignore[assignment]  # one word more
        "1/p", description="after dropping: divide each entry by its chance, restore the L1 norm, or leave as it is"
    )
    granularity: ClassVar = "row"
    buffers: ClassVar = 14
    pass_depends_on: ClassVar = ("density", "epsilon")
    exempt: ClassVar = {
        "seed-free": "draws which entries are kept",
        "tied": "draws are keyed by the tensor's name, so two stored copies of a tensor get two draws",
    }

    def problem(self, p: Params) -> str | None:
        for density, epsilon in zip(p.density, p.epsilon, strict=True):
            if density < 1.0 and not epsilon <= density <= 1.0 - epsilon:
                low, high = density - epsilon, density + epsilon
                return f"density {density} and epsilon {epsilon} make chances from {low:.4g} to {high:.4g}, not 0 to 1"
        return super().problem(p)

    def thin(self, group: TensorGroup, p: Params, stats: Stats) -> None:
        for place, (density, epsilon) in enumerate(zip(p.density, p.epsilon, strict=True)):
            if density < 1.0:
                self._drop(group, place, density, epsilon)

    def _drop(self, group: TensorGroup, place: int, density: float, epsilon: float) -> None:
        """Zero what is to go of one model's task vector; divide the rest, if asked to."""
        from mergetool.kernels.masks import packed, unpack

        delta, kept, key = group.deltas[place], group.kept, ("della", place)
        if kept is not None and key in kept:
            delta.mul_(unpack(kept[key], group.scratch("chances")))
            return
        choice = self._choice(group, place, density, epsilon)
        if kept is not None and choice.device.type == "cpu":
            kept[key] = packed(choice)
        delta.mul_(choice)

    def _choice(self, group: TensorGroup, place: int, density: float, epsilon: float) -> "Tensor":
        """1 where an entry of one model's task vector is kept, else 0; what chances divide, if they do, is divided."""
        import torch

        from mergetool.kernels.rng import draw, stream_key
        from mergetool.kernels.row_ranks import spread_by_rank_

        delta = group.deltas[place]
        rows = delta.reshape(1 if delta.dim() < 2 else len(delta), -1)
        chances = group.scratch("chances")
        table = _chances(rows.shape[1], density, epsilon, rows.device, rows.dtype)
        spread_by_rank_(rows, table, chances.view_as(rows), group.scratch)
        if self.rescale == "1/p":
            delta.div_(chances).mul_(_RESOLUTION)
        key = stream_key(group.seed, group.name, group.names[place], "della")
        words, hashing = (group.scratch(name, torch.int32).view(-1) for name in ("draws", "hashing"))
        draws = draw(key, group.start, words, hashing).view_as(delta)  # from -2^15 up
        return chances.sub_(draws).gt_(_RESOLUTION // 2)


class DellaLinear(_Della):
    """`base + scale * sum(w_i drop(x_i - base))`"""

    method: Literal["della-linear"] = "della-linear"


class Della(_Della):
    """`base + scale * mean of the dropped task vectors that agree with the elected sign`"""

    method: Literal["della"] = "della"
    normalize: bool = Field(True, strict=True, description=MEAN)
    votes: ClassVar = True


@lru_cache(maxsize=8)  # a device would be waited for at every slice
def _chances(length: int, density: float, epsilon: float, device: "torch.device", dtype: "torch.dtype") -> "Tensor":
    """Chances of a row's entries by rank, the smallest first, in units of 2^-16."""
    import torch

    ranks = torch.linspace(0.0, 1.0, length, dtype=torch.float64) if length > 1 else torch.tensor([0.5])
    chances = (density - epsilon) + 2.0 * epsilon * ranks.double()
    return (chances * _RESOLUTION).round().clamp(1, _RESOLUTION).to(device, dtype)
