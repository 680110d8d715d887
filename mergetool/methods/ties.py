"""Trim task vectors, elect a sign for every entry, merge the entries that agree.

Fine-tuned models disturb one another in two ways: many of their changes are tiny and mean nothing, and some changes
have opposite signs. TIES keeps the largest `density` of each task vector, lets the weighted sum decide the sign of
every entry, and averages only the values that have it.

Reference: Yadav et al., TIES-Merging, NeurIPS 2023, https://arxiv.org/abs/2306.01708, section 3, algorithm 1.
Differs from the paper: trimming is per tensor unless `scope: model`, which is the paper's; thresholds are exact, and
what happens to entries exactly at the threshold is a choice (`boundary`; with 16-bit models they are many). Weights
act before the vote. An entry whose weighted sum is exactly 0 has no majority and keeps the base's value (the authors'
code gives it the sign that is most frequent in the whole model). `rescale: l1` is not the paper's; mergekit has it.
"""

from typing import ClassVar, Literal

from mergetool.methods.base import Field, Finite, Fraction, PerModel, Scheduled
from mergetool.methods.families.scope import ScopedMethod
from mergetool.methods.families.sparse import MEAN
from mergetool.methods.families.trimmed import LargestMethod


class Ties(LargestMethod):
    """`base + scale * mean of the trimmed task vectors that agree with the elected sign`"""

    method: Literal["ties"] = "ties"
    density: PerModel[Fraction] = Field(0.2, description="share of each task vector that is kept")
    weight: PerModel[Finite] = Field(1.0, description="weight of each task vector, in the vote and in the mean")
    scale: Scheduled[Finite] = Field(1.0, description="factor on the merged task vector (lambda in the paper)")
    normalize: bool = Field(True, strict=True, description=MEAN)
    votes: ClassVar = True
    exempt: ClassVar = {
        "independent scope=model": ScopedMethod.alike["independent"],
        **LargestMethod.exempt,
    }
