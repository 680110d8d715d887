"""What a step changes of the base, as the product of two thin matrices."""

from torch import Tensor

from mergetool.kernels.low_rank import Pair as Product
from mergetool.kernels.low_rank import leading, truncated
from mergetool.planning.operations import Pair


def factors(changed: Tensor, operation: Pair) -> tuple[Product, float]:
    """B (m, r) and A (r, n) of a change (m, n), and the share of its length (Frobenius norm) that they leave out."""
    product, lost = leading(changed.mT if operation.transposed else changed, operation.keep)
    if product.a.shape[0] <= operation.most:
        return product, lost
    product, more = truncated(product, operation.most)
    return product, (lost**2 + (1 - lost**2) * more**2) ** 0.5
