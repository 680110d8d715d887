"""What a step changes of the base, as the product of two thin matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergetool.errors import MergeError
from mergetool.kernels.low_rank import Pair as Product
from mergetool.kernels.low_rank import concatenated, leading, truncated
from mergetool.methods.base import Params, StatisticsPass, Stats
from mergetool.methods.families.low_rank import Products, merged_products, seen
from mergetool.methods.group import Note
from mergetool.planning.graph import Plan, Step
from mergetool.planning.operations import Decompose
from mergetool.planning.parents import label
from mergetool.tensors.factors import Halves, nothing_added


def factors(changed: Tensor, operation: Decompose) -> tuple[Product, float]:
    """B (m, r) and A (r, n) of a change (m, n), and the share of its length (Frobenius norm) that they leave out."""
    return leading(changed.mT if operation.transposed else changed, operation.keep)


def merged(plan: Plan, step: Step, operation: Decompose, notes: list[Note], stats: Stats) -> tuple[Product, float]:
    """The same of a step whose models are the base and factors; no tensor of the full size is formed.

    Of experts, A of all of them one below the other, B with the directions of one expert next to those of the next.
    """
    parts = [_merged(plan, step, operation, halves, notes, stats) for halves in _halves(plan, step, operation)]
    if operation.experts == 1:
        return parts[0]
    rank = max(product.a.shape[0] for product, _ in parts)
    a = torch.cat([pad(product.a, (0, 0, 0, rank - product.a.shape[0])) for product, _ in parts])
    b = torch.stack([pad(product.b, (0, rank - product.b.shape[1])) for product, _ in parts], 2).flatten(1)
    return Product(b, a), max(lost for _, lost in parts)


def counted(plan: Plan, step: Step, operation: Decompose, counts: StatisticsPass) -> Tensor:
    """What a pass over the whole model counts of such a step."""
    assert operation.method is not None
    numbers, total = Params(**operation.inner.numbers), []
    for halves in _halves(plan, step, operation):
        products = _products(plan, step, operation, [Product(b, a) for b, a in halves], [])
        total.append(counts.observe(seen(operation.method, products), numbers))
    return torch.stack(total).sum(0)


def _halves(plan: Plan, step: Step, operation: Decompose) -> list[list[Halves]]:
    """The factors of all models: of each expert by itself, where there are several."""
    shape = step.spec.shape
    every = [plan.sources[operand.source].factors(operand.tensor) or nothing_added(shape) for operand in step.models]
    for operand, found in zip(step.models, every, strict=True):
        _check_finite(operand.source, found)
    if operation.experts == 1:
        return [every]
    return [
        [(b[index], a[index]) if a.dim() > 2 else nothing_added(shape[1:]) for b, a in every]
        for index in range(operation.experts)
    ]


def _check_finite(model: str, halves: Halves) -> None:
    """Raise MergeError for factors that hold what no decomposition can take."""
    if not all(bool(torch.isfinite(half).all()) for half in halves):
        fix = "save that adapter again, or leave it out"
        raise MergeError(f"{label(model)} has factors that are not finite", "", fix)


def _merged(
    plan: Plan, step: Step, operation: Decompose, every: Sequence[Halves], notes: list[Note], stats: Stats
) -> tuple[Product, float]:
    pairs = [Product(b, a) for b, a in every]
    if operation.method is None:
        product, lost = truncated(concatenated(pairs, operation.inner.coefficients()), operation.keep)
    else:
        products = _products(plan, step, operation, pairs, notes)
        numbers = Params(**operation.inner.numbers)
        product, lost = merged_products(operation.method, products, numbers, operation.keep, stats)
    return (Product(product.a.mT, product.b.mT) if operation.transposed else product), lost


def _products(plan: Plan, step: Step, operation: Decompose, pairs: Sequence[Product], notes: list[Note]) -> Products:
    shape = step.spec.shape[-2:] if operation.experts > 1 else step.spec.shape
    scales = tuple(plan.sources[operand.source].scale(operand.tensor) for operand in step.models)
    return Products(step.key, shape, operation.models, pairs, plan.seed, notes, scales)
