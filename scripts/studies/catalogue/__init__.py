"""A study of every method that needs no data, on three kinds of real fine-tunes; see README.md in this folder."""
