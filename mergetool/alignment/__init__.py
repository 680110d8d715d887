"""Alignment of whole checkpoints: from models and an architecture to group elements, and from those to a report.

The floor between the mathematics (`kernels`), the meaning of tensor names (`arch`) and the methods that align.
"""
