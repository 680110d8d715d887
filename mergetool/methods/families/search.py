"""Methods that try candidates of other methods."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.methods.base import Method

if TYPE_CHECKING:
    from mergetool.search.space import SearchSpace, Value


class SearchMethod(Method):
    """A method that judges many candidates: settings of another method, with some numbers left open."""

    searches: ClassVar = True
    varies: ClassVar = False

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
