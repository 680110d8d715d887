"""Merging methods, one file per idea. Being in this folder (or in the entry-point group of its name) registers one."""

import pkgutil
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from mergetool.methods.base import Method, all_methods, registered

GROUP = "mergetool.methods"
"""The group of entry points by which installed packages bring methods: `NAME = "MODULE"`, or `"MODULE:CLASS"`."""


class PluginWarning(UserWarning):
    """An installed package that brings methods cannot be loaded; all others can be used."""


def registry() -> dict[str, type[Method]]:
    """Every method by name: the files of this folder, those of installed plug-ins, and classes made since."""
    return all_methods()


def method_named(name: str) -> type[Method] | None:
    """One method. Where no package brings others, only its own file is loaded, if it is called like it."""
    file = name.replace("-", "_")
    if not has_plugins() and file.isidentifier():
        with suppress(ModuleNotFoundError):
            import_module(f"{__name__}.{file}")
    kind = registered(name)
    return kind if kind is not None and kind.__module__ == f"{__name__}.{file}" else registry().get(name)


@cache
def has_plugins() -> bool:
    """Whether installed packages bring methods."""
    return bool(entry_points(group=GROUP))


@cache
def load_all() -> None:
    """Load the files of this folder, and of plug-ins."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for plugin in entry_points(group=GROUP):
        try:
            plugin.load()
        except Exception as error:  # whatever its code does: it is not ours, and must not end our run
            warnings.warn(_broken(plugin, error), PluginWarning, stacklevel=2)


def _broken(plugin: EntryPoint, error: Exception) -> str:
    package = plugin.dist.name if plugin.dist else plugin.module
    what = f"the plug-in {plugin.name!r} ({plugin.value}, package {package}) cannot be loaded"
    fix = f"upgrade it (pip install -U {package}) or remove it (pip uninstall {package})"
    return f"{what}, and its methods are missing: {type(error).__name__}: {error}\n  fix: {fix}"
