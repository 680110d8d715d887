"""Merge each linear layer so that it answers as the models' own layers do, on what the merged layers below it make.

RegMean asks what goes into a layer of each model by itself. In the merged model something else goes in: what its merged
lower layers make of a row. RegMean++ goes through the blocks from the first to the last: the rows of every model go
through the blocks that are merged already, then through that model's own next block, where the inputs of its linear
layers are measured; the block is merged by them, and so on. The blocks are the longest list of modules in the network.
What follows them (a pooler, a head) is the model's own, on the output of the merged blocks.

Reference: Nguyen et al., RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging,
https://arxiv.org/abs/2508.03121.
Differs from the paper: as `regmean` does from its own: a small `ridge` towards the average, in float64; linear layers
outside the blocks are merged in the same way (FusionBench and MergeBench leave them as the base has them; MergeBench
takes an alpha of 0.1). All models are in memory at once while it measures, and what it measures holds for these models,
weights and numbers only.
"""

from typing import ClassVar, Literal

from mergetool.methods.families.regression import Regression


class RegMeanPlus(Regression):
    """`W^T = (sum w_i G_i)^-1 sum w_i G_i W_i^T`, G_i of what merged layers below make; the average for all else"""

    method: Literal["regmean-plus"] = "regmean-plus"
    statistic: ClassVar = "merged-gram"
