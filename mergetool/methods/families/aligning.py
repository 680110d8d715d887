"""What the aligning methods share: permute every model into one common order, merge there, and repair if asked to.

They differ in how they search for the permutations (`search`).
"""

from abc import abstractmethod
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mergetool.alignment.models import Fitted, Headers, Models
from mergetool.alignment.options import MATCH_HELP, REPAIR_HELP, WEIGHTS, MatchBy, Repair
from mergetool.arch.code import code_of
from mergetool.methods.base import AnyTensorMethod, Field, TensorMethod
from mergetool.methods.families.fitted import FittedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.alignment.fitted import Aligned
    from mergetool.alignment.maps import Mapped


class AligningMethod(FittedMethod):
    """A method that permutes every model into one common order, merges them there, and may repair the result."""

    combine: AnyTensorMethod = Field(
        default={"method": "linear"}, validate_default=True, description="the method that merges the aligned models"
    )
    match: MatchBy = Field(default=WEIGHTS, description=MATCH_HELP)
    repair: Repair = Field(default={}, validate_default=True, description=REPAIR_HELP)
    needs_base: ClassVar = "unused"
    min_models: ClassVar = 2

    @abstractmethod
    def search(self, models: Models) -> "Aligned | Mapped":
        """The permutations, or other maps. Raises PlanError or MergeError."""

    def kernel(self) -> TensorMethod:
        return self.combine

    def files(self) -> Mapping[str, str]:
        named: dict[str, str | None] = {}
        for section, options in (("match", self.match), ("repair", self.repair)):
            network = None if options.network is None else options.network.rpartition(":")[0]
            named |= {f"merge.{section}.data": options.data, f"merge.{section}.network": network}
        return {field: path for field, path in named.items() if path is not None}

    def code(self) -> Mapping[str, str]:
        named = {"merge.match.network": self.match.network, "merge.repair.network": self.repair.network}
        return {field: text for field, text in named.items() if text is not None}

    def fit_memory(self, headers: Headers, threads: int) -> int:
        from mergetool.alignment.task import search_bytes, spec_of

        if headers.architecture == "auto" or code_of(headers.architecture or ""):
            return 0  # found by building and tracing the network: known when the run begins
        one = 4 * sum(prod(shape) for shape in headers.shapes.values())
        repairing = 4 * one if self.finishes() else 0  # the network, and merged and aligned weights
        return max(search_bytes(spec_of(headers), len(headers.names), threads, self.match), repairing)

    def fit(self, models: Models) -> Fitted:
        from mergetool.alignment.finish import check

        check(self.repair, models)
        return self.search(models)

    def load(self, models: Models, folder: Path) -> Fitted | None:
        from mergetool.alignment.fitted import load_beside

        return load_beside(folder, models)

    def finishes(self) -> bool:
        return self.repair.mode != "none"

    def finish(
        self, models: Models, fitted: Fitted, merged: "Mapping[str, Tensor]", folder: Path | None
    ) -> "Mapping[str, Tensor]":
        from mergetool.alignment.finish import finish

        return finish(self.repair, models, fitted, merged, folder)
