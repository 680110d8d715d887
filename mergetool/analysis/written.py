"""Figures as they are left in a folder: as JSON, and as a page."""

from collections.abc import Callable
from pathlib import Path

from mergetool.errors import OutputError
from mergetool.tensors.writer import make_folder, write_file


def write_both(folder: Path, name: str, data: str, page: Callable[[], str]) -> Path:
    """Write `NAME.json` and `NAME.html`, whose path is returned. Raises OutputError.

    Without the extra `report` there is no page: that is an error, told when the data are written.
    """
    make_folder(folder)
    write_file(folder / f"{name}.json", data + "\n")
    path = folder / f"{name}.html"
    try:
        write_file(path, page())
    except ModuleNotFoundError as error:
        fix = "pip install 'mergetool[report]'"
        raise OutputError(f"{error.name} is not installed", str(path), fix) from None
    return path
