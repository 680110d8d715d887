"""Methods that look at whole models first, and at the merged model in the end."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from mergetool.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

_I = TypeVar("_I")
_T = TypeVar("_T")


class Models(Protocol):
    """The whole models, as `FittedMethod.fit` sees them: any tensor of any model, whenever it is wanted."""

    names: tuple[str, ...]
    """Models in the recipe's order; the base, if there is one, under "base" and last."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every floating-point tensor that all models hold, by name, in file order."""
    config: Mapping[str, Any]
    """config.json of the first model, or empty."""
    architecture: str | None
    """The recipe's `architecture`: a family, a spec file (absolute path), or None."""

    def read(self, model: str, name: str) -> "Tensor":
        """One tensor, whole, in compute dtype, on the CPU; a fresh copy."""
        ...

    def path(self, text: str) -> Path:
        """A path written in the recipe, made absolute."""
        ...

    def say(self, text: str) -> None:
        """A line of progress for people."""
        ...

    def share(self, call: Callable[[_I], _T], items: Sequence[_I]) -> Iterable[_T]:
        """`call` of every item, in order. Several processes share the work; one alone does it as results are drawn."""
        ...


class Fitted(Protocol):
    """What a fit found out: small, savable, and able to show every model's tensors in the common space."""

    def apply(self, model: str, name: str, tensor: "Tensor") -> "Tensor":
        """Tensor `name` of `model`, moved to the common space: same shape and dtype."""
        ...

    def save(self, folder: Path) -> None:
        """Write artefact and report beside the merged weights. A killed run loads them instead of fitting again."""
        ...


class FittedMethod(Method):
    """A method that sees the whole models first (`fit`); then its kernel merges what the fit made of them."""

    uses_architecture: ClassVar = True
    varies: ClassVar = False

    def stages(self) -> tuple[str, ...]:
        return ("fit", "count", "merge", *(("finish",) if self.finishes() else ()))

    def parts(self) -> Mapping[str, Method]:
        return {"combine": self.kernel()}

    @abstractmethod
    def fit(self, models: Models) -> Fitted:
        """Look at the whole models. Raises PlanError or MergeError."""

    @abstractmethod
    def load(self, models: Models, folder: Path) -> Fitted | None:
        """The fit that `save` wrote into this folder, or None where there is none."""

    def finishes(self) -> bool:
        """Whether `finish` has something to do once everything is merged."""
        return False

    def finish(
        self, models: Models, fitted: Fitted, merged: "Mapping[str, Tensor]", folder: Path | None
    ) -> "Mapping[str, Tensor]":
        """Tensors of the merged model to replace (same shapes), in compute dtype. Raises PlanError or SourceError.

        A killed run asks again when some tensors are replaced already: what is found must first be kept in `folder`.
        """
        return {}
