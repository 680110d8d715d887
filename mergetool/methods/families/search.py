"""Methods that try candidates of other methods."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mergetool.methods.base import Method

if TYPE_CHECKING:
    from mergetool.search.space import SearchSpace, Value
    from mergetool.tensors.source import ModelSource


class SearchMethod(Method):
    """A method that judges many candidates: settings of another method, with some numbers left open."""

    searches: ClassVar = True
    varies: ClassVar = False
    reshapes: ClassVar[bool] = False
    """Whether candidates are networks of other shapes than the models."""

    def settled(self, sources: "Mapping[str, ModelSource]") -> Self:
        """The same method, knowing what headers of the models tell of its numbers. Raises PlanError."""
        return self

    def stages(self) -> tuple[str, ...]:
        return ("search",)

    def tried(self, models: Sequence[str]) -> Sequence[dict[str, Any]]:
        return [self.candidate(values, models) for values in self.space(models).corners]

    @abstractmethod
    def space(self, models: Sequence[str]) -> "SearchSpace":
        """The numbers that are open, for these models."""

    @abstractmethod
    def candidate(self, values: "Sequence[Value]", models: Sequence[str]) -> dict[str, Any]:
        """The `merge` section of a recipe in which the open numbers have these values."""

    def arranged(self, values: "Sequence[Value]", models: Sequence[str]) -> dict[str, Any]:
        """The sections beside it that say where layers come from; none where they stay as they are."""
        return {}
