"""What a result says about where its inputs lie: enough to know them again, nothing about the machine it was made on.

Lock and model card are pushed as they are, so they never hold an absolute path. One inside the recipe's folder becomes
relative to it, of any other the last part is left; SHA-256 tell what a file is.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INSIDE = re.compile(r"(?<![^\s=\[{,'\"(])/[^\s,'\"\]})]+")
"""An absolute path inside a text."""


def redacted(value: Any, folder: Path) -> Any:
    """JSON-able data without absolute paths. `folder` is the recipe's."""
    match value:
        case str():
            whole = value.startswith("/") and "\n" not in value
            return _shown(value, folder) if whole else _INSIDE.sub(lambda path: _shown(path[0], folder), value)
        case Mapping():
            return {key: redacted(each, folder) for key, each in value.items()}
        case list() | tuple():
            return [redacted(each, folder) for each in value]
        case _:
            return value


def _shown(path: str, folder: Path) -> str:
    known = Path(path)
    return known.relative_to(folder).as_posix() if known.is_relative_to(folder) else known.name
