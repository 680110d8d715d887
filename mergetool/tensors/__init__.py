"""Bytes <-> tensors: the dtype table, headers, sources to read from, slots to write to."""
