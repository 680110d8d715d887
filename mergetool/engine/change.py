"""What a step changes of the base, as the product of two thin matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergetool.errors import MergeError
from mergetool.kernels.low_rank import Pair as Product
from mergetool.kernels.low_rank import concatenated, leading, truncated
from mergetool.methods.base import Params
from mergetool.methods.families.low_rank import Products, merged_products
from mergetool.methods.group import Note
from mergetool.planning.graph import Plan, Step
from mergetool.planning.operations import Decompose
from mergetool.planning.parents import label
from mergetool.tensors.factors import Halves, nothing_added


def factors(changed: Tensor, operation: Decompose) -> tuple[Product, float]:
    """B (m, r) and A (r, n) of a change (m, n), and the share of its length (Frobenius norm) that they leave out."""
    return leading(changed.mT if operation.transposed else changed, operation.keep)


def merged(plan: Plan, step: Step, operation: Decompose, notes: list[Note]) -> tuple[Product, float]:
    """The same of a step whose models are the base and factors; no tensor of the full size is formed.

    Of experts, A of all of them one below the other, B with the directions of one expert next to those of the next.
    """
    shape = step.spec.shape
    every = [plan.sources[operand.source].factors(operand.tensor) or nothing_added(shape) for operand in step.models]
    for operand, found in zip(step.models, every, strict=True):
        _check_finite(operand.source, found)
    if operation.experts == 1:
        return _merged(plan, step, operation, every, notes)
    parts = []
    for index in range(operation.experts):
        halves = [(b[index], a[index]) if a.dim() > 2 else nothing_added(shape[1:]) for b, a in every]
        parts.append(_merged(plan, step, operation, halves, notes))
    rank = max(product.a.shape[0] for product, _ in parts)
    a = torch.cat([pad(product.a, (0, 0, 0, rank - product.a.shape[0])) for product, _ in parts])
    b = torch.stack([pad(product.b, (0, rank - product.b.shape[1])) for product, _ in parts], 2).flatten(1)
    return Product(b, a), max(lost for _, lost in parts)


def _check_finite(model: str, halves: Halves) -> None:
    """Raise MergeError for factors that hold what no decomposition can take."""
    if not all(bool(torch.isfinite(half).all()) for half in halves):
        fix = "save that adapter again, or leave it out"
        raise MergeError(f"{label(model)} has factors that are not finite", "", fix)


def _merged(
    plan: Plan, step: Step, operation: Decompose, every: Sequence[Halves], notes: list[Note]
) -> tuple[Product, float]:
    pairs = [Product(b, a) for b, a in every]
    if operation.method is None:
        product, lost = truncated(concatenated(pairs, operation.inner.coefficients()), operation.keep)
    else:
        shape = step.spec.shape[-2:] if operation.experts > 1 else step.spec.shape
        scales = tuple(plan.sources[operand.source].scale(operand.tensor) for operand in step.models)
        products = Products(step.key, shape, operation.models, pairs, plan.seed, notes, scales)
        numbers = Params(**operation.inner.numbers)
        product, lost = merged_products(operation.method, products, numbers, operation.keep)
    return (Product(product.a.mT, product.b.mT) if operation.transposed else product), lost
