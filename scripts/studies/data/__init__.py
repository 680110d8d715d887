"""A study of merging with some data beside merging without; see README.md in this folder."""
