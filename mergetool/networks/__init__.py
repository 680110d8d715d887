"""The one seam to transformers: classes, empty models, where tensors of a checkpoint go, tokenizers."""
