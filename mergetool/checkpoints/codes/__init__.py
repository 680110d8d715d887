"""Quantised weights as the numbers they stand for: one file for each way to store codes and scales.

    scaled      8-bit floats or integers times a scale for the tensor, a row, a column group or a block
    blocks      bitsandbytes' 4 bits: a table of sixteen values, and a scale for every 64 in a row
    fours       4-bit floats of GPT-OSS, with a power of two for every 32 in a row
    nibbles     4-bit floats of compressed-tensors and ModelOpt (NVFP4, MXFP4), with a scale for every few in a row
    packed      GPTQ, AWQ and compressed-tensors: several small integers in each of 32 bits, with zero points and scales

`dequantised` shows a model with the weights themselves, made slice by slice in float32 when they are read.
"""

from mergetool.checkpoints.codes.blocks import describes_codes
from mergetool.checkpoints.codes.source import dequantised, is_dequantised, quantisation_of

__all__ = ["dequantised", "describes_codes", "is_dequantised", "quantisation_of"]
