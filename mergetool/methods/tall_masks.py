"""Keep the sum of all task vectors, and of each expert the bits that say which entries of it are its own.

An expert's mask has the entries where its own change t is large beside what the others add, `|t| > margin |sum - t|`;
the expert is the base plus those entries of the sum. Where changes of experts lie in different places, each comes back
nearly as it was. The result is a bundle, as that of `mass`: beside the base one more model in `factors`, and one bit an
entry for each expert. A larger margin keeps fewer entries, with less of the others in them; at 1 an entry is kept
exactly where keeping it is nearer to the expert than dropping it.

`load_bundle(path)(tasks=["sst2"], ...)` is one expert, `{source: out/masks, select: sst2}` is it in a recipe of any
method. Which one an input belongs to is told by the router of `mass`, for which some directions of some matrices are
kept, too; `router: null` leaves them out. Classifiers as transformers saves them keep their own heads.

Reference: Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024,
https://arxiv.org/abs/2405.07813.
Differs from the paper: the margin (their lambda) is one number for all tasks, where theirs is chosen for each, between
0.2 and 0.6, on validation data; the task need not be named; the sum is rounded to bfloat16 unless `factors` says
otherwise, and masks are those of what was rounded; an input that belongs to several tasks (`top_k`) gets the mean of
their changes.
"""

from typing import Literal

from mergetool.methods.base import Field, Positive
from mergetool.methods.families.masks import MasksMethod


class TallMasks(MasksMethod):
    """A bundle: base, the sum of all task vectors, a mask per task, router"""

    method: Literal["tall-masks"] = "tall-masks"
    margin: Positive = Field(
        0.4, description="an entry is a task's own where its change exceeds this many times what all others add to it"
    )

    @property
    def least(self) -> float:
        return self.margin
