"""Task vectors as gradients: how far a task vector is a step down the loss of its task, in sums over slices.

With the gradient g of a task's loss at the base and its task vector t:

alignment       -<t, g> / (|t| |g|)            step        -<t, g> / |g|^2
linearity       (loss(base) - loss(base + t)) / -<t, g>
cross-talk      <g_s, t_t> / <g_s, t_s>

Adam moves along gradients divided by their root mean square over batches, so the plain alignment of what it has
trained is small; `preconditioned` is the alignment with g / (sqrt(mean over batches of g^2) + 1e-8).

Reference: Crisostomi, "Model Merging: Foundations and Algorithms" (2026), task vectors as approximate gradients.
"""

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from mergetool.kernels.differences import cosine

_SMALL = 1e-8


@dataclass(frozen=True)
class Descent:
    """Products of a task vector with a gradient, of one slice or of many added up, in float64."""

    moved2: float = 0.0
    """Of the task vector with itself."""
    gradient2: float = 0.0
    product: float = 0.0
    """Of the task vector with the gradient: negative where the loss falls."""
    scaled2: float = 0.0
    """Of the preconditioned gradient with itself."""
    scaled: float = 0.0
    """Of the task vector with the preconditioned gradient."""

    def __add__(self, other: "Descent") -> "Descent":
        return Descent(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def alignment(self) -> float:
        """Cosine of the task vector and the way down; NaN where one has no direction."""
        return cosine(-self.product, self.moved2, self.gradient2)

    @property
    def preconditioned(self) -> float:
        """The same with what Adam makes of the gradient."""
        return cosine(-self.scaled, self.moved2, self.scaled2)

    @property
    def step(self) -> float:
        """Length of the step along the gradient, as a learning rate; NaN where there is no gradient."""
        return -self.product / self.gradient2 if self.gradient2 else math.nan

    def linearity(self, before: float, after: float) -> float:
        """Share of the fall that the gradient promises that really comes, with the losses at both ends; NaN without."""
        return (before - after) / -self.product if self.product else math.nan


def descent(moved: Tensor, gradient: Tensor, squares: Tensor | None = None) -> Descent:
    """Products of two flat slices of one length; `squares`: mean over batches of the squared gradient."""
    moved, gradient = moved.double(), gradient.double()
    sums = [float(torch.dot(one, two)) for one, two in ((moved, moved), (gradient, gradient), (moved, gradient))]
    if squares is None:
        return Descent(*sums)
    scaled = gradient / (squares.double().sqrt() + _SMALL)
    return Descent(*sums, *(float(torch.dot(scaled, other)) for other in (scaled, moved)))
