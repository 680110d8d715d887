"""Which tensors of the models each output tensor comes from, one file per idea. Being in this folder registers one."""

import pkgutil
from functools import cache
from importlib import import_module

from mergetool.layouts.base import Layout, all_layouts, serving_layouts
from mergetool.methods.base import Method


@cache
def registry() -> dict[str, type[Layout]]:
    """Every layout that brings sections of its own into a recipe, by the first of them."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return all_layouts()


def layout_with(method: Method) -> Layout | None:
    """The layout that comes with a method, where it says itself where tensors come from."""
    if not method.arranges:
        return None
    registry()
    return serving_layouts()[str(method.method_name())].of(method)
