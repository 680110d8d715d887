"""Real runs of a case, from files to files; merges that are cut into slices and units of any size."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from tempfile import TemporaryDirectory
from typing import Any

import mergetool.engine as engine
from mergetool.api import run as run_recipe
from mergetool.methods.families import ranks
from mergetool.testing.cases import MethodCase
from mergetool.testing.toys import INTEGERS, State, read, write, write_statistics


def run(case: MethodCase, *, exact: bool = False, shard_size: int | str = "5GB", **flags: Any) -> tuple[State, int]:
    """Merge the case's toy models on the disk; what was written, and in how many files."""
    with TemporaryDirectory() as place:
        base, models = case.toys(exact=exact)
        states = {name: state | INTEGERS for name, state in {"base": base, **models}.items()}
        paths = {name: str(path) for name, path in write(Path(place) / "models", states).items()}
        recipe = {
            **({"base": paths["base"]} if case.has_base else {}),
            "models": {name: paths[name] for name in case.names},
            **case.architecture,
            **write_statistics(Path(place) / "statistics", case.statistics(models)),
            "merge": case.section(),
            "output": {"shard_size": shard_size},
        }
        result = run_recipe(recipe, output=Path(place) / "out", **flags)
        return read(result.path), len(list(result.path.glob("*.safetensors")))


@contextmanager
def cut_finely(slice_elements: int, unit_elements: int) -> Iterator[None]:
    """The two sizes are constants that several modules import; give all of them other values for a while.

    Ranks are found as in large tensors then, by counting.
    """
    _import_engine()
    modules = [module for name, module in sys.modules.items() if name.startswith("mergetool.")]
    with ExitStack() as stack:
        stack.enter_context(replaced(ranks, "SMALL", 0))
        for key, value in (("SLICE_ELEMENTS", slice_elements), ("UNIT_ELEMENTS", unit_elements)):
            holders = [module for module in modules if hasattr(module, key)]
            assert holders, key
            for module in holders:
                stack.enter_context(replaced(module, key, value))
        yield


@cache
def _import_engine() -> None:
    """All modules that hold the sizes."""
    for package in walk_packages(engine.__path__, f"{engine.__name__}."):
        import_module(package.name)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
