"""Muon in float32: `torch.optim.Muon` multiplies in bfloat16, for which many processors have no instructions.

Reference: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor

_MOMENTUM, _DECAY, _STEPS = 0.95, 0.1, 5
_A, _B, _C = 3.4445, -4.775, 2.0315


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with its defaults, for float32 matrices."""

    def __init__(self, matrices: Iterable[Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                self._move(weight, group["lr"])

    def _move(self, weight: Tensor, lr: float) -> None:
        momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(weight.grad, 1 - _MOMENTUM)
        towards = orthogonalised(weight.grad.lerp(momentum, _MOMENTUM))
        weight.mul_(1 - lr * _DECAY).sub_(towards, alpha=lr * sqrt(max(1, weight.shape[0] / weight.shape[1])))


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T (m, n), by Newton-Schulz steps: singular values end between 0.5 and 1.5."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.mT).mT
    made = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = made @ made.mT
        made = torch.addmm(made, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), made, beta=_A)
    return made
