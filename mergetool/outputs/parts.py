"""Results of recipes inside a recipe, for as long as they are needed: folders in PATH.partial.parts, beside the output.

Whoever holds the output's journal owns them. Each is a result like any other, written with a journal of its own, so a
killed run goes on inside the one that it was making. They go when the output has its name, when nothing reads them any
more, and when another recipe takes the place.
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from mergetool.errors import OutputError
from mergetool.tensors.writer import parts_path

_OURS = re.compile(r"[0-9a-f]{16}(\..*)?")


def check_parts(output: Path) -> None:
    """Raise OutputError where something else has the name of the folder."""
    folder = parts_path(output)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError("is in the way and is not a folder", str(folder), "remove it")
    if not all(_OURS.fullmatch(path.name) for path in _held(folder)):
        raise OutputError("is in the way and was not made by mergetool", str(folder), "remove it")


def keep_parts(output: Path, names: Collection[str]) -> None:
    """Remove all but these results and what is being made of them; at last the folder."""
    folder = parts_path(output)
    for path in _held(folder):
        if _OURS.fullmatch(path.name) and path.name.partition(".")[0] not in names:
            _remove(path)
    if folder.is_dir() and not _held(folder):
        folder.rmdir()


def remove_part(place: Path) -> None:
    """Remove what is left of a result that is not whole."""
    if place.exists():
        _remove(place)


def has_parts(output: Path) -> bool:
    """Whether there is any finished result."""
    return any("." not in path.name for path in _held(parts_path(output)))


def _held(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
