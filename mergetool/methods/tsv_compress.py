"""Keep every expert as a few directions beside the base: a library from which each one can be rebuilt.

What fine-tuning changes in a weight matrix has few directions that matter. Each expert keeps its leading singular
vectors, as many as fit side by side with those of the others, so all experts together take about a third more than the
matrices they change, however many there are. Whoever knows the task gets its expert back nearly as good as it was:
`models: {sst2: {source: out/library, select: sst2}}` in a recipe, or `load_bundle(path)(tasks=["sst2"], ...)`.
Classifiers as transformers saves them keep their own heads and labels. LoRA adapters on the base are kept by their own
factors, without forming a fine-tune.

Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, https://arxiv.org/abs/2412.00081, section 4.1.
Differs from the paper: what a model did not change takes no space; factors are rounded to bfloat16 unless `factors`
says otherwise; directions of least energy are left out beyond `size`; a tensor that is smaller in full than as factors
is kept in full; convolutions are compressed, too.
"""

from typing import TYPE_CHECKING, Literal

from mergetool.methods.families.bundle import FactorsMethod

if TYPE_CHECKING:
    from mergetool.bundle.options import Options


class TsvCompress(FactorsMethod):
    """A library: base and factors per task"""

    method: Literal["tsv-compress"] = "tsv-compress"

    def options(self) -> "Options":
        return self.kept("tsv-compress")
