"""Pure mathematics of tensors: tensors and numbers in, tensors out."""
