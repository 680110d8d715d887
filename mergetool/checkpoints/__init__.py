"""What a folder of files means: weights under the names of their family, tied tensors, facts, side files."""
