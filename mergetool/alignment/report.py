"""What an alignment did, in numbers: for people, and for the lock."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergetool.alignment.task import AlignmentTask
from mergetool.kernels.frank_wolfe import Iteration
from mergetool.kernels.matching import objective
from mergetool.kernels.permute import Element
from mergetool.kernels.weight_matching import hard_point


def report_of(
    task: AlignmentTask, method: str, elements: Mapping[str, Element], history: Sequence[Iteration | float]
) -> dict[str, Any]:
    """A JSON-able report: objective, its history, the share of coordinates moved, distances before and after.

    A row of `history` is a Frank-Wolfe step, or an objective. Numbers are rounded to what all thread counts agree on.
    """
    identity = [Element.identity(task.spec.spaces)] * len(task.names)
    home = [elements[name].inverse() for name in task.names]
    before, after = (objective(task.problem, hard_point(task.problem, elements)) for elements in (identity, home))
    digits = 8 - math.frexp(max(abs(before), abs(after)))[1] * 3 // 10  # about nine that count

    def shown(row: Iteration | float) -> object:
        if not isinstance(row, Iteration):
            return round(row, digits)
        return {"objective": round(row.objective, digits), "gap": round(row.gap, digits), "step": round(row.length, 6)}

    return {
        "method": method,
        "architecture": task.spec.family,
        "spec": task.spec.digest(),
        "models": list(task.names),
        "objective": {"before": round(before, digits), "after": round(after, digits)},
        "history": [shown(row) for row in history],
        "moved": {name: _moved(elements[name]) for name in task.names},
        "distance": {"before": _distances(task, identity), "after": _distances(task, home)},
        "verification": {"outputs": task.proof, "there and back": _residual(task, home)},
    }


def _moved(element: Element) -> dict[str, float]:
    """For each space, the share of coordinates that another one takes the place of (or whose sign changes)."""
    shares = {}
    for name, index in element.index.items():
        away = index != torch.arange(index.shape[-1])
        if name in element.sign:
            away = away | (element.sign[name] < 0)
        shares[name] = round(float(away.double().mean()), 6)
    return shares


def _distances(task: AlignmentTask, home: Sequence[Element]) -> list[list[float]]:
    """Between every two models: |W_i - W_j| / sqrt(|W_i| |W_j|) over all matched tensors."""
    num_models = len(home)
    products = torch.zeros(num_models, num_models, dtype=torch.float64)
    layouts = task.spec.layouts(matched=True)
    for name, axes in layouts.items():
        rows = torch.stack([_flat(home[i].apply(task.weights[i][name], axes)) for i in range(num_models)])
        products += (rows @ rows.T).double().cpu()
    norms = products.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * products).clamp_min(0)
    scale = (norms[:, None] * norms[None, :]).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return [[round(float(value), 6) for value in row] for row in (squared / scale).sqrt()]


def _residual(task: AlignmentTask, home: Sequence[Element]) -> float:
    """The largest difference in any tensor of a model that was carried to the universe and back."""
    back = [element.inverse() for element in home]
    return max(
        float((back[i].apply(home[i].apply(model[name], axes), axes) - model[name]).abs().max())
        for i, model in enumerate(task.weights)
        for name, axes in task.spec.layouts(matched=True).items()
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).float() if tensor.dtype != torch.float64 else tensor.detach().reshape(-1)
