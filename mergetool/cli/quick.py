"""torch's start, shortened for a run that only computes: waiting for it is half of what a small merge takes.

Its kernels, some hundred megabytes to be linked, are opened by a thread beside the reading of the recipe (the import
then finds them). What only compilers, exporters, and tensors without data need of it is loaded when somebody asks:
a quarter of its import. Nothing is left out: an attribute, or another library that may build on it, brings it.
"""

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Thread
from types import ModuleType
from typing import Any

_LATER = ("torch._meta_registrations", "torch.export")
_NEEDS_ALL = ("torch._dynamo", "torch._inductor", "torch._export", "torch.onnx")
_USERS = ("transformers", "accelerate", "peft", "lm_eval", "bitsandbytes", "compressed_tensors", "diffusers", "timm")
"""Libraries that run networks, and may ask for shapes without data."""
_WAY = "_how_mergetool_loads_it"
_KERNELS = ("libtorch_global_deps.so", "libtorch_cpu.so")


def prepare_torch(*, whole: bool) -> None:
    """Begin what can be begun before the import, and shorten that, unless `whole`, for code of others."""
    if "torch" in sys.modules:
        return
    if sys.platform == "linux":
        Thread(target=_link, daemon=True).start()
    if not whole:
        shorten_torch()


def _link() -> None:
    """Link the kernels as the import will; the interpreter's lock is left alone."""
    import ctypes

    found = importlib.machinery.PathFinder.find_spec("torch")
    for folder in (found and found.submodule_search_locations) or ():
        with suppress(OSError, AttributeError):  # the import will say what is wrong, if anything is
            for name in _KERNELS:
                kind = os.RTLD_GLOBAL if name == _KERNELS[0] else os.RTLD_LOCAL
                ctypes.CDLL(None).dlopen(os.fsencode(f"{folder}/lib/{name}"), os.RTLD_NOW | kind)


def shorten_torch() -> None:
    """Have the import of torch leave for later what computing does not need; not beside methods of other packages."""
    from mergetool.methods import has_plugins

    if not has_plugins():
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Gives some modules a loader that waits; ends the waiting when a library comes that may need them."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _LATER:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Later(spec.loader, self)
            return spec
        if name.startswith(_NEEDS_ALL) or name.partition(".")[0] in _USERS:
            self.end()
        return None

    def hold(self, module: "_Waiting") -> ModuleType:
        self._waiting.append(module)
        return module

    def end(self) -> None:
        """Load what waits: from now on, torch is as it always is."""
        with suppress(ValueError):  # another thread has just done so
            sys.meta_path.remove(self)
        while self._waiting:
            self._waiting.pop(0).load()


class _Later(Loader):
    """Loads a module when it is asked for something."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._finder.hold(_Waiting(spec.name))

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_WAY] = (self._loader, self._finder)


class _Waiting(ModuleType):
    """A module before it is loaded."""

    def load(self) -> None:
        loader, _ = vars(self).pop(_WAY)
        self.__class__ = ModuleType  # type: ignore[assignment]
        loader.exec_module(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules wants nothing of this one
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _, finder = vars(self)[_WAY]
        finder.end()
        return getattr(self, name)
