"""transformers itself: imported when it is needed, and kept quiet."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from threading import RLock
from typing import Any

from mergetool.errors import MergetoolError, SourceError

BUILDING = RLock()
"""Held while a network is built: libraries change torch for all threads meanwhile."""
INSTALL = "pip install 'mergetool[eval]'"


def library(what: str, where: str, kind: type[MergetoolError] = SourceError) -> Any:
    """The package. Raises an error of a kind, saying what needs it, where it is missing."""
    try:
        import transformers
    except ImportError:
        raise kind(f"{what} needs transformers, which is not installed", where, INSTALL) from None
    return transformers


def module_of_library(name: str) -> Any:
    """One of its modules; None where this version has no such."""
    try:
        return import_module(f"transformers.{name}")
    except ImportError:
        return None


def class_of(config: Mapping[str, Any], where: str, what: str = "model") -> Any:
    """The class that config.json names, or AutoModel where it names none. Raises SourceError for an unknown one."""
    transformers = library("building a network", where)
    name, *_ = config.get("architectures") or ["AutoModel"]
    if (kind := getattr(transformers, str(name), None)) is None:
        fix = f"install the version that the {what} was made with"
        raise SourceError(f"transformers {transformers.__version__} has no {name}", where, fix)
    return kind


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no remarks about parts of a checkpoint that nobody asked for."""
    logging: Any = library("loading a network", "transformers").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What a library says, short enough to be part of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
