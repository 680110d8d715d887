"""What methods share that see tensors as directions and lengths, and whose result lies in the span of the models'.

A base, where there is one, is the centre of the sphere: directions and lengths are those of task vectors then.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from mergetool.methods.base import Factored, Granularity, Params, StatisticsPass, Stats, TensorGroup, TensorMethod
from mergetool.methods.families.gram import Gram, vectors_of

if TYPE_CHECKING:
    from torch import Tensor

_NOTE = "directions that cancel: straight line"


class SphereMethod(TensorMethod):
    """A method whose result is the base plus a combination of vectors, by factors that follow from inner products."""

    needs_base: ClassVar = "optional"
    granularity: ClassVar[Granularity] = "element"
    buffers: ClassVar = 4

    @property
    def needs_float64(self) -> bool:
        return True

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return "cores"

    @abstractmethod
    def factors(self, gram: "Tensor", p: Params) -> "Tensor | None":
        """Factors (N,) on the vectors, from their inner products (N, N), both in float64; None for a straight line."""

    @abstractmethod
    def straight(self, p: Params) -> tuple[float, ...]:
        """Factors of the straight line."""

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        return Gram(self.found, p)

    def found(self, total: "Tensor", p: Params) -> Stats:
        """Factors from the summed inner products."""
        factors = self.factors(total, p)
        return (
            {"factor": self.straight(p), "straight": (1.0,)} if factors is None else {"factor": tuple(factors.tolist())}
        )

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        if "straight" in stats:
            group.note(_NOTE)
        total = group.scratch("total").zero_()
        for vector, factor in zip(vectors_of(group), stats["factor"], strict=True):
            total.add_(vector, alpha=factor)
        return total if group.base is None else group.base.add_(total)


def shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Weights that add up to 1."""
    return tuple(weight / sum(weights) for weight in weights)
