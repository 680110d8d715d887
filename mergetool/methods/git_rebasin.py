"""Match every model to one reference, pair by pair, then merge them: Git Re-Basin.

For each model alone, layer by layer: permute its neurons so that its weights agree best with the reference's, until no
layer moves. A good and cheap way to align two models. With more than two, the result depends on which model is the
reference, and maps between the others do not compose (C2M3 and MergeMany look at all models at once). With
`match: {by: activations}` neurons are the same that say the same to the same inputs: every layer is then matched by
itself, exactly.

Reference: Ainsworth et al., Git Re-Basin, ICLR 2023, https://arxiv.org/abs/2209.04836, sections 3.1, 3.2 and algorithm
1; Li et al., Convergent Learning, ICLR 2016, https://arxiv.org/abs/1511.07543 (correlations of activations).
Differs from the paper: layers in the network's order, not a random one, so that a recipe gives one result; attention
heads, grouped queries and signs beside plain permutations; running statistics do not take part in the matching;
activations are compared by correlation unless `compare: product` asks for the paper's sums.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from mergetool.alignment.models import Models
from mergetool.alignment.options import WEIGHTING_HELP, Text, Weighting
from mergetool.methods.base import Field
from mergetool.methods.families.aligning import AligningMethod

if TYPE_CHECKING:
    from mergetool.alignment.fitted import Aligned


class GitRebasin(AligningMethod):
    """Pairwise weight matching to a reference."""

    method: Literal["git-rebasin"] = "git-rebasin"
    reference: Text | None = Field(None, description="model that the others are matched to; the first by default")
    weighting: Weighting = Field("none", description=WEIGHTING_HELP)
    exempt: ClassVar = {"order": "the first model is the reference unless the recipe names one"}

    def model_names(self) -> Mapping[str, str]:
        return {} if self.reference is None else {"merge.reference": self.reference}

    def search(self, models: Models) -> "Aligned":
        from mergetool.alignment.fitted import Aligned
        from mergetool.alignment.report import report_of
        from mergetool.alignment.task import task_of
        from mergetool.kernels.weight_matching import match_to_reference

        task = task_of(models, weighting=self.weighting, match=self.match)
        reference = task.place(self.reference or models.names[0], "merge.reference")
        to_reference = match_to_reference(task.problem, reference, models.share)
        elements = {name: element.inverse() for name, element in zip(task.names, to_reference, strict=True)}
        models.say(f"matched {len(task.names) - 1} models to {task.names[reference]!r}")
        return Aligned(task.spec, elements, report_of(task, "git-rebasin", elements, ()))
