"""Match each model in turn to the sum of the others until nothing moves, then merge: MergeMany.

Git Re-Basin for more than two models: one of them at a time is matched, layer by layer, to where the others are now.
Every move increases the agreement of all models, so it ends. Simple and fast; C2M3 looks at all models and layers at
once before it moves any, and ends a little higher.

Reference: Ainsworth et al., Git Re-Basin, ICLR 2023, https://arxiv.org/abs/2209.04836, MergeMany in the appendix.
Differs from the paper: models in an order that follows from their contents and layers in the network's order, not
random ones, so that a recipe gives one result; attention heads, grouped queries and signs; running statistics do not
take part in the matching.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.alignment.models import Models
from mergetool.alignment.options import WEIGHTING_HELP, Weighting
from mergetool.methods.base import Field
from mergetool.methods.families.aligning import AligningMethod

if TYPE_CHECKING:
    from mergetool.alignment.fitted import Aligned


class MergeMany(AligningMethod):
    """Coordinate ascent on the agreement of all models."""

    method: Literal["merge-many"] = "merge-many"
    weighting: Weighting = Field("none", description=WEIGHTING_HELP)
    exempt: ClassVar = {
        "units": "the order of neurons is that of a model chosen by content, which is other for other numbers",
        "precision": "the order of neurons is that of a model chosen by content, as read in the compute dtype",
    }

    def search(self, models: Models) -> "Aligned":
        from mergetool.alignment.fitted import Aligned
        from mergetool.alignment.report import report_of
        from mergetool.alignment.task import task_of
        from mergetool.kernels.frank_wolfe import in_universe_of
        from mergetool.kernels.weight_matching import merge_many

        task = task_of(models, weighting=self.weighting, match=self.match)
        to_universe, history = merge_many(task.problem)
        elements = dict(zip(task.names, in_universe_of(to_universe, 0), strict=True))
        models.say(f"matched {len(task.names)} models in {len(history) - 1} sweeps, objective {history[-1]:.6g}")
        return Aligned(task.spec, elements, report_of(task, "merge-many", elements, history))
