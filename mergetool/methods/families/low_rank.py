"""Adapters merged by themselves: how methods see the products of thin matrices that adapters add to a weight.

A method says how much of a product it must see (`TensorMethod.in_factors`). Most need no more than small cores or one
turned side; the rest see rows of the products, a few at a time, and the leading part of what they make is sought in
passes over these. What comes out is what the method makes of the dense task vectors, but for rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from mergetool.methods.base import Factored, Note, Params, StatisticsPass, Stats, TensorGroup, TensorMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergetool.kernels.low_rank import Cores, Keep, Pair

    Rows = Callable[[int, int], Tensor]

HELD = 1 << 26
"""Entries of a merged matrix that are kept while its leading part is sought: 256 MiB."""
_SLICE = 1 << 20
"""Entries of each product that are looked at together."""


@dataclass
class Products:
    """What adapters add to one tensor: b a of every model, in the order of `names`.

    A model whose adapter leaves the tensor as it is has a product of rank 0.
    """

    name: str
    shape: tuple[int, ...]
    """Shape of the tensor: (m, ...), where all axes but the first are the n columns of the products."""
    names: tuple[str, ...]
    pairs: "Sequence[Pair]"
    seed: int = 0
    notes: list[Note] = field(default_factory=list)
    scales: tuple[float, ...] | None = None
    """What each b has been multiplied by, where that matters: alpha / r of an adapter (default: 1)."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n)."""
        return self.shape[0], prod(self.shape[1:])


def merged_products(
    method: TensorMethod, products: Products, p: Params, keep: "Keep", known: Stats | None = None
) -> "tuple[Pair, float]":
    """The merged change as a product, as much of it as is kept, and what that loses (Frobenius norm, relative).

    What passes over the whole model have found is `known`; what is missing is counted over these products.
    """
    from mergetool.kernels.low_rank import concatenated, leading_of_rows, summed_halves, truncated

    match method.in_factors(products.name, products.shape):
        case "sum":
            return truncated(concatenated(products.pairs, method.coefficients(p)), keep)
        case "halves":
            scales = products.scales or (1.0,) * len(products.pairs)
            return truncated(summed_halves(products.pairs, method.half_coefficients(scales, p)), keep)
        case "product":
            device = products.pairs[0].b.device
            return leading_of_rows(
                _held(merged_rows(method, products, p, known=known), products), products.matrix, keep, device=device
            )
        case way:
            return _merged_cores(method, products, p, keep, way, known)


def _held(rows: "Rows", products: Products) -> "Rows":
    """Rows that are asked for several times: made once, where the whole of them is not too much to hold."""
    import torch

    m, n = products.matrix
    if m * n > HELD:
        return rows
    whole = torch.empty(m, n, device=products.pairs[0].b.device)
    for start in range(0, m, step := max(1, _SLICE // n)):
        whole[start : start + step] = rows(start, min(start + step, m))
    return lambda start, stop: whole[start:stop]


def _merged_cores(
    method: TensorMethod, products: Products, p: Params, keep: "Keep", way: Factored, known: Stats | None
) -> "tuple[Pair, float]":
    from mergetool.kernels.low_rank import lifted

    cores = _cores(products, way)
    if not cores.cores[0].numel():
        return lifted(cores, cores.cores[0], keep)

    def group() -> TensorGroup:
        return _core_group(method, products, cores)

    stats = known or _counted(method, p, [group], prod(products.shape), 64)
    return lifted(cores, method.merge(group(), p, stats).view_as(cores.cores[0]), keep)


def _cores(products: Products, way: Factored) -> "Cores":
    from mergetool.kernels.low_rank import in_cores

    return in_cores(products.pairs, outputs=way != "inputs", inputs=way != "outputs")


def _core_group(method: TensorMethod, products: Products, cores: "Cores") -> TensorGroup:
    flat = method.granularity_in(products.name, products.shape) == "element"
    return _group(method, products, [core.flatten() if flat else core.clone() for core in cores.cores])


def seen(method: TensorMethod, products: Products) -> Iterator[TensorGroup]:
    """What a pass over the whole model sees of products: cores where that will do, else the whole matrices."""
    way = method.in_factors(products.name, products.shape)
    if way == "product":
        yield _group(method, products, [pair.dense().float().view(products.shape) for pair in products.pairs])
    elif (cores := _cores(products, way)).cores[0].numel():
        yield _core_group(method, products, cores)


def merged_rows(
    method: TensorMethod,
    products: Products,
    p: Params,
    *,
    dtype: "torch.dtype | None" = None,
    known: Stats | None = None,
) -> "Rows":
    """Rows [start, stop) of the merged change, as a matrix (m, n), made anew whenever they are asked for.

    What must be counted first is counted here. A method that must see whole tensors has them whole.
    """
    import torch

    dtype = dtype or torch.float32
    (m, n), grain = products.matrix, method.granularity_in(products.name, products.shape)
    halves = [(pair.b.to(dtype), pair.a.to(dtype)) for pair in products.pairs]

    def group(start: int, stop: int) -> TensorGroup:
        models = [b[start:stop] @ a for b, a in halves]
        shape = (-1,) if grain == "element" else (stop - start, *products.shape[1:])
        return _group(method, products, [model.view(shape) for model in models], start * n)

    rows = m if grain == "tensor" else max(1, _SLICE // n)
    parts = [lambda start=start: group(start, min(start + rows, m)) for start in range(0, m, rows)]
    stats = known or _counted(method, p, parts, m * n, torch.finfo(dtype).bits)
    if grain == "tensor":
        whole = method.merge(group(0, m), p, stats).view(m, n)
        return lambda start, stop: whole[start:stop]
    return lambda start, stop: method.merge(group(start, stop), p, stats).view(stop - start, n)


def _group(method: TensorMethod, products: Products, models: "list[Tensor]", start: int = 0) -> TensorGroup:
    import torch

    base = None if method.needs_base == "unused" else torch.zeros_like(models[0])
    about = products.name, products.shape, products.names
    return TensorGroup(*about, base, models, start=start, seed=products.seed, notes=products.notes)


def _counted(
    method: TensorMethod, p: Params, parts: Sequence[Callable[[], TensorGroup]], num_elements: int, bits: int
) -> Stats:
    """What the method's passes find out about the whole tensor."""
    concluded: StatisticsPass | Stats | None = method.statistics_pass(p, num_elements, bits)
    while concluded is not None and not isinstance(concluded, Mapping):
        concluded = concluded.conclude(concluded.observe((part() for part in parts), p))
    return concluded or {}
