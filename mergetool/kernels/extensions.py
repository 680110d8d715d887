"""Compiled modules of scipy without the packages that they lie in: their import takes a third of a second or more."""

import importlib.machinery
import importlib.util
import sys
from threading import Lock
from typing import Any

_extensions: dict[str, Any] = {}
_loading = Lock()


def extension(name: str) -> Any:
    """A module such as scipy.linalg.cython_blas; loaded once, as threads must not load it side by side."""
    with _loading:
        if name not in _extensions:
            _extensions[name] = _load(name)
        return _extensions[name]


def _load(name: str) -> Any:
    import scipy

    package = name.rpartition(".")[0]
    places = [f"{place}/{package.partition('.')[2]}" for place in scipy.__path__]
    found = importlib.machinery.PathFinder.find_spec(name, places)
    if package in sys.modules or found is None or found.loader is None:  # there, or laid out in another way
        return importlib.import_module(name if found else package)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
