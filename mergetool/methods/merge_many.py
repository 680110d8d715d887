"""Match each model in turn to the sum of the others until nothing moves, then merge: MergeMany.

Git Re-Basin for more than two models: one of them at a time is matched, layer by layer, to where the others are now.
Every move increases the agreement of all models, so it ends. Simple and fast; C2M3 looks at all models and layers at
once before it moves any, and ends a little higher.

Reference: Ainsworth et al., Git Re-Basin, ICLR 2023, https://arxiv.org/abs/2209.04836, MergeMany in the appendix.
Differs from the paper: models in an order that follows from their contents and layers in the network's order, not
random ones, so that a recipe gives one result; attention heads, grouped queries and signs; running statistics do not
take part in the matching.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.alignment.options import REPAIR_HELP, WEIGHTING_HELP, Repair, Weighting
from mergetool.methods.base import AnyTensorMethod, Field, Fitted, FittedMethod, Models, TensorMethod

if TYPE_CHECKING:
    from torch import Tensor


class MergeMany(FittedMethod):
    """Coordinate ascent on the agreement of all models."""

    method: Literal["merge-many"] = "merge-many"
    weighting: Weighting = Field("none", description=WEIGHTING_HELP)
    combine: AnyTensorMethod = Field(
        default={"method": "linear"}, validate_default=True, description="the method that merges the aligned models"
    )
    repair: Repair = Field(default={}, validate_default=True, description=REPAIR_HELP)
    needs_base: ClassVar = "unused"
    min_models: ClassVar = 2
    exempt: ClassVar = {
        "units": "the order of neurons is that of a model chosen by content, which is other for other numbers",
        "precision": "the order of neurons is that of a model chosen by content, as read in the compute dtype",
    }

    def inner(self) -> TensorMethod:
        return self.combine

    def finishes(self) -> bool:
        return self.repair.mode != "none"

    def finish(
        self, models: Models, fitted: Fitted, merged: "Mapping[str, Tensor]", folder: Path | None
    ) -> "Mapping[str, Tensor]":
        from mergetool.alignment.finish import finish
        from mergetool.alignment.fitted import Aligned

        assert isinstance(fitted, Aligned)
        return finish(self.repair, models, fitted, merged, folder)

    def load(self, models: Models, folder: Path) -> Fitted | None:
        from mergetool.alignment.fitted import load_beside

        return load_beside(folder, models)

    def fit(self, models: Models) -> Fitted:
        from mergetool.alignment.fitted import Aligned
        from mergetool.alignment.report import report_of
        from mergetool.alignment.task import task_of
        from mergetool.kernels.frank_wolfe import in_universe_of
        from mergetool.kernels.weight_matching import merge_many

        task = task_of(models, weighting=self.weighting)
        found, history = merge_many(task.problem)
        elements = dict(zip(task.names, in_universe_of(found, 0), strict=True))
        models.say(f"matched {len(task.names)} models in {len(history) - 1} sweeps, objective {history[-1]:.6g}")
        return Aligned(task.spec, elements, report_of(task, "merge-many", elements, history))
