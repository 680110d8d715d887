"""Methods that look at whole models first, and at the merged model in the end."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mergetool.alignment.models import Fitted, Models
from mergetool.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor


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
