"""Whole models as an alignment sees them, before and while their weights are read, and what it has found out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergetool.tensors.header import TensorSpec

_I = TypeVar("_I")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Headers:
    """What is known of whole models before a weight is read: as in `Models`."""

    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    architecture: str | None


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
    folder: Path | None
    """Where the first model and its tokenizer lie, if in a folder."""

    @property
    def device(self) -> "torch.device":
        """Where to compute."""
        ...

    def shapes_of(self, model: str) -> Mapping[str, tuple[int, ...]]:
        """The shapes of one model by itself: other ones than `shapes` where a method takes models of other widths."""
        ...

    def read(self, model: str, name: str) -> "Tensor":
        """One tensor, whole, in compute dtype, on `device`; a fresh copy."""
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

    def shown(self, spec: "TensorSpec") -> "TensorSpec":
        """What a tensor is in the common space."""
        ...

    def apply(self, model: str, name: str, tensor: "Tensor") -> "Tensor":
        """Tensor `name` of `model`, moved to the common space: as it is `shown`."""
        ...

    def save(self, folder: Path) -> None:
        """Write artefact and report beside the merged weights. A killed run loads them instead of fitting again."""
        ...
