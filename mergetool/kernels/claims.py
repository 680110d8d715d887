"""Which task claims an input? Kernel ridge regression on examples: inputs of every task, and inputs of none.

A task's claim f is to be 1 at its own examples and 0 at all others; it minimises

    sum_i (f(x_i) - y_i)^2 + h |f|^2    with the kernel k(x, z) = exp(-|x - z|^2)

so f(x) = sum_i k(x, x_i) w_i, w = (K + h)^-1 y. Far from all examples it is 0. What would be claimed at examples G,
had none of these been there, needs no other fit: y_G - (((K + h)^-1)_GG)^-1 w_G.

Legend: N examples, B inputs, D features, T tasks.

Reference: Rifkin and Lippert, Notes on Regularized Least Squares (2007), section 4, for one example left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_HELD = 0.03
"""h: how much a claim is held back."""


def claims(x: Tensor, examples: Tensor, weights: Tensor) -> Tensor:
    """Claims (B, T) on inputs x (B, D), by examples (N, D) and their weights (N, T)."""
    return _near(x, examples) @ weights


def _near(x: Tensor, examples: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, examples).square())


def fit(examples: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (N, T), float64, of examples (N, D) with targets (N, T); and (K + h)^-1 (N, N)."""
    exact = examples.to(torch.float64)
    near = _near(exact, exact)
    near.diagonal().add_(_HELD)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(near))
    return inverse @ targets.to(torch.float64), inverse


def left_out(targets: Tensor, weights: Tensor, inverse: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """(len(groups), T): claims on the first example of each group without all of that group."""
    rows = []
    for group in groups:
        chosen = torch.tensor(group, device=inverse.device)
        rows.append(targets[group[0]] - torch.linalg.solve(inverse[chosen][:, chosen], weights[chosen])[0])
    return torch.stack(rows)
