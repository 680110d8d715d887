"""A study of merging and routing on real fine-tunes; see README.md in this folder."""
