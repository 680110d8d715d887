"""Merge neural networks in weight space."""

__version__ = "0.1.0"
