"""Align n networks trained from different seeds, all at once and consistently, then merge them.

Networks of one architecture that were trained apart hold the same features in different orders, and their average is
worth nothing. C2M3 finds for each of them one permutation per layer (of channels, heads, the residual stream) into a
common *universe*, such that the images agree best: the sum of inner products over all pairs is maximised by Frank-Wolfe
over the permutations' convex hull. Maps between two models go through the universe, so going round any cycle of models
leads back to the start; with maps found pair by pair it does not. In the universe any method can merge (`combine`).

It wants models of one architecture trained from different seeds, of small or middle size; fine-tunes of one base are
aligned already (then it changes nothing). The permutations are kept beside the result, in the folder `alignment`.

Reference: Crisostomi et al., C2M3: Cycle-Consistent Multi-Model Merging, NeurIPS 2024, https://arxiv.org/abs/2405.17897.
Differs from the paper: linear in the number of models where the paper loops over pairs; exact line search; stops by the
Frank-Wolfe gap; of two models one is held (with both free the search goes back and forth); several starts, one of them
MergeMany, and a hard polish; running statistics are permuted but do not take part in the matching; attention heads,
grouped queries and the signs that RMSNorm and LayerNorm allow; REPAIR averages standard deviations, as its own paper
does, not variances.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from mergetool.alignment.models import Models
from mergetool.alignment.options import Align
from mergetool.methods.base import Field
from mergetool.methods.families.aligning import AligningMethod

if TYPE_CHECKING:
    from mergetool.alignment.fitted import Aligned
    from mergetool.alignment.task import AlignmentTask
    from mergetool.kernels.frank_wolfe import Alignment


class C2M3(AligningMethod):
    """Frank-Wolfe into a common universe."""

    method: Literal["c2m3"] = "c2m3"
    align: Align = Field(default={}, validate_default=True, description="how to search for the permutations")
    exempt: ClassVar = {
        "units": "the order of neurons is that of a model chosen by content, which is other for other numbers",
        "precision": "the order of neurons is that of a model chosen by content, as read in the compute dtype",
    }

    @model_validator(mode="after")
    def _matches_for_a_reason(self) -> Self:
        if self.align.permutations is not None and self.match.by != "weights":
            raise ValueError("with align.permutations nothing is searched, so match would have no effect")
        return self

    def files(self) -> Mapping[str, str]:
        taken = self.align.permutations
        return {**super().files(), **({} if taken is None else {"merge.align.permutations": taken})}

    def model_names(self) -> Mapping[str, str]:
        return {} if self.align.anchor is None else {"merge.align.anchor": self.align.anchor}

    def search(self, models: Models) -> "Aligned":
        from mergetool.alignment.fitted import Aligned, load
        from mergetool.alignment.report import report_of
        from mergetool.alignment.task import spec_of, task_of
        from mergetool.kernels.permute import Element

        if self.align.permutations is not None:
            return load(models.path(self.align.permutations), spec_of(models), models.names)
        task = task_of(models, weighting=self.align.weighting, match=self.match)
        fit = self._search(task, models)
        elements = dict(zip(task.names, fit.elements, strict=True))
        report = report_of(task, "c2m3", elements, fit.history)
        if all(element.equals(Element.identity(element.spaces)) for element in fit.elements):
            models.say("the models are in one order already: nothing is permuted")
        else:
            models.say(f"aligned {len(task.names)} models: {len(fit.history)} steps, objective {fit.objective:.6g}")
        return Aligned(task.spec, elements, report)

    def _search(self, task: "AlignmentTask", models: Models) -> "Alignment":
        from mergetool.kernels.frank_wolfe import AlignmentSettings, align

        asked = self.align
        settings = AlignmentSettings(
            mode=asked.mode,
            init=asked.init,
            anchor=None if asked.anchor is None else task.place(asked.anchor, "merge.align.anchor"),
            polish=asked.polish,
            starts=asked.starts,
            releases=asked.releases,
            iterations=asked.iterations,
            tolerance=asked.tolerance,
        )
        return align(task.problem, settings, models.share)
