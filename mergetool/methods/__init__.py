"""Merging methods, one file per idea. Being in this folder (or in the entry-point group of its name) registers one."""

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from mergetool.methods.base import Method, all_methods


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by name: the files of this folder, then those of installed plug-ins."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for plugin in entry_points(group="mergetool.methods"):
        plugin.load()
    return all_methods()
