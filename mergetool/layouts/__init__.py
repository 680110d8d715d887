"""Which tensors of the models each output tensor comes from, one file per idea. Being in this folder registers one."""

import pkgutil
from functools import cache
from importlib import import_module

from mergetool.layouts.base import Layout, all_layouts


@cache
def registry() -> dict[str, type[Layout]]:
    """Every layout that brings sections of its own into a recipe, by the first of them."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return all_layouts()
