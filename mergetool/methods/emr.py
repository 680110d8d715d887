"""Keep one elected change for all experts, and of each the bits that say which entries are its own, and a scale.

Entry by entry, the sign of the sum of all task vectors is elected, with the largest size among those that have it. An
expert is the base plus its scale times the entries whose sign is that of its own change; the scale brings the size of
its changes back. Nothing is tuned and no data are needed. The result is a bundle, as that of `mass`: beside the base it
takes one more model in `factors`, and one bit an entry for each expert, however much an expert changed; so it keeps
more of an expert than a few directions do, and takes more space for few experts.

`load_bundle(path)(tasks=["sst2"], ...)` is one expert, `{source: out/emr, select: sst2}` is it in any recipe. Which one
an input belongs to is told by the router of `mass`, for which some directions of some matrices are kept, too;
`router: null` leaves them out. Classifiers as transformers saves them keep their own heads.

Reference: Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024,
https://arxiv.org/abs/2405.17461.
Differs from the paper: the task need not be named; the elected change is rounded to bfloat16 unless `factors` says
otherwise, and masks and scales are those of what was rounded; an input that belongs to several tasks (`top_k`) gets the
mean of their changes.
"""

from typing import Literal

from mergetool.methods.families.masks import MasksMethod


class Emr(MasksMethod):
    """A bundle: base, one elected change, a mask and a scale per task, router"""

    method: Literal["emr"] = "emr"

    @property
    def least(self) -> float:
        return 0.0
