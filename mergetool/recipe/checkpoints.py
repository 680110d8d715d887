"""`models: {glob: "runs/checkpoint-*"}`: the checkpoints of one run as models, in natural order, by their own names.

Numbers in names count as numbers: checkpoint-900 comes before checkpoint-1000. `last: 5` takes the last five. What was
found stands in the lock in full, so that a run can be made again when there are more.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetool.recipe.document import Document
from mergetool.recipe.schema import expanded

_WILD = re.compile(r"[*?\[]")
_KEYS = {"glob", "last"}
_LEFT = re.compile(r"\.partial(\.\w+)?$")
"""What a killed run leaves: no checkpoint."""
_ENDS = (".safetensors", ".bin", ".pt", ".pth")

SCHEMA = {
    "type": "object",
    "properties": {
        "glob": {"type": "string", "description": "folders or files, such as runs/checkpoint-*"},
        "last": {"type": "integer", "minimum": 1, "description": "only so many, from the end of the natural order"},
    },
    "required": ["glob"],
    "additionalProperties": False,
}
"""For editors."""


def with_checkpoints(document: Document) -> Document:
    """The recipe with every checkpoint that a glob finds as a model. Raises RecipeError."""
    models = document.data.get("models")
    if not isinstance(models, dict) or not _is_glob(models):
        return document
    if more := [key for key in models if key not in _KEYS]:
        what = f"a glob stands for all models, so {', '.join(map(repr, more))} cannot stand beside it"
        raise document.error(("models", more[0]), what, "write every model by name, or only `glob` and `last`")
    last = models.get("last")
    if last is not None and (type(last) is not int or last < 1):
        raise document.error(("models", "last"), f"expected a whole number above 0, found {last!r}", "write last: 5")
    found = _found(document, str(models["glob"]))
    chosen = found if last is None else found[-last:]
    names = _names(chosen)
    named: dict[str, Any] = {name: str(path) for name, path in zip(names, chosen, strict=True)}
    if "base" in named:
        others = ", ".join(f"{name}: {path}" for name, path in named.items() if name != "base")
        what = f"{models['glob']} matches {named['base']}, too, and no model can be called 'base'"
        raise document.error(("models", "glob"), what, f"write the others by name: models: {{{others}}}")
    return replace(document, data={**document.data, "models": named})


def _is_glob(models: dict[str, Any]) -> bool:
    pattern = models.get("glob")
    return isinstance(pattern, str) and ("last" in models or _WILD.search(pattern) is not None)


def _found(document: Document, pattern: str) -> list[Path]:
    """What matches, as the recipe would write it: relative to its folder where the pattern is."""
    start = expanded(pattern)
    whole = Path(document.folder) / start
    anchor, rest = Path(whole.anchor), whole.relative_to(whole.anchor)
    every = [path for path in anchor.glob(str(rest)) if not _LEFT.search(path.name)]
    matching = [path for path in every if path.is_dir() or path.suffix in _ENDS]
    if every and not matching:
        what = f"{pattern} matches files only, and none of weights ({', '.join(_ENDS)})"
        raise document.error(("models", "glob"), what, "write a pattern of folders, such as runs/checkpoint-*")
    if not matching:
        raise document.error(("models", "glob"), f"nothing matches {pattern}", f"check the path: ls -d {pattern}")
    _check_output(document, whole)
    folder = Path(document.folder).absolute()
    told = [path if start.is_absolute() else _relative(path, folder) for path in matching]
    return sorted(told, key=_natural)


def _check_output(document: Document, pattern: Path) -> None:
    """What is made would be one of the models the next time, and what is half made, after a kill."""
    output = document.data.get("output")
    path = output.get("path") if isinstance(output, dict) else None
    if isinstance(path, str) and _plain(document.folder / expanded(path)).match(str(_plain(pattern))):
        what = f"{path} would itself be one of the models, for {pattern.name} matches it"
        raise document.error(("output", "path"), what, "write another path, such as path: out/merged")


def _plain(path: Path) -> Path:
    """Without `..`, as it is written: nothing need be there yet."""
    return Path(os.path.normpath(path.absolute()))


def _relative(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers as numbers, and before letters."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = [
            "-".join(path.with_suffix("").parts[-count:] if path.suffix in _ENDS else path.parts[-count:])
            for path in paths
        ]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
