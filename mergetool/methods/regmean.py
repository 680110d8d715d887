"""Merge each linear layer so that it answers as the models' own layers do: regression of their outputs.

What goes into a layer is told by its Gram matrix on calibration data (section `calibration`), the mean of `x x^T` over
tokens. The merged matrix is the one whose outputs differ least, in squares, from those of every model on that model's
own inputs: a linear system with a closed solution. All that is no linear layer (embeddings, norms, biases) is averaged,
and so is a layer in directions that no input has.

`alpha` shrinks what lies off the diagonals of Gram matrices: 1 is plain regression, 0 weighs each input by its mean
square alone; in between, the system is better behaved where data are few.

Reference: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models (RegMean), ICLR 2023,
https://arxiv.org/abs/2212.09849, section 3.
Differs from the paper: solved for the difference from the average by Cholesky in float64, with a small `ridge` towards
the average; layers with one input (query, key and value) are measured once. The paper takes an alpha of 0.9 for some
models and 0.1 for others, MergeBench one of 0.5 ("reduction"), with embeddings and head of the base.
"""

from typing import ClassVar, Literal

from mergetool.methods.families.regression import Regression


class RegMean(Regression):
    """`W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T` for linear layers, the average for all else"""

    method: Literal["regmean"] = "regmean"
    statistic: ClassVar = "gram"
