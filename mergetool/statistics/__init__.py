"""Measures of models on data, one file each, kept like models: tensors under the names of the weights.

rows        calibration data: JSON lines
examples    the same as tokens, with labels
images      the same as pixels
base        what a statistic is
gradient    the way down its loss
activation  how large what goes into each layer is
loss        how wrong a model is
gram        inner products of what goes into each linear layer
prefix      the same where all blocks before are merged
coefficients  how much of each task vector to take
fisher      how much each parameter matters for what a model says
store       where they are kept, under the hash of all that decides them
measure     one statistic of one model: kept, or measured now
"""
