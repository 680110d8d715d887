"""Scores of language models, item by item. lm-eval is the only judge; everything it is told passes through here."""
