"""What a step changes of the base, as the product of two thin matrices."""

from torch import Tensor

from mergetool.kernels.low_rank import Pair as Product
from mergetool.kernels.low_rank import leading
from mergetool.planning.operations import Pair


def factors(changed: Tensor, operation: Pair) -> tuple[Product, float]:
    """B (m, r) and A (r, n) of a change (m, n), and the share of its length (Frobenius norm) that they leave out."""
    return leading(changed.mT if operation.transposed else changed, operation.keep)
