"""What corrects a bundle's router: `calibration.json` beside the manifest.

Every task's distances get an offset, and all a temperature. The file names the manifest that it was made for by its
hash, and counts only with that. Deleting it takes the correction back.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from mergetool.bundle.manifest import MANIFEST_NAME, Unknown
from mergetool.errors import SourceError
from mergetool.tensors.io import sha256_file

CALIBRATION_NAME = "calibration.json"


class Calibration(BaseModel):
    """What is subtracted from the tasks' distances, in the order of the bundle's tasks, and what divides them then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: str
    """SHA-256 of the bundle's manifest."""
    offsets: tuple[float, ...]
    temperature: float
    num_rows: int
    doubt: float | None = None
    """The most doubt about a known input, of routers that tell unknown ones."""
    doubts: tuple[float, ...] | None = None
    """The same by the nearest task, where not all tasks have the one above."""


def most_doubt(unknown: Unknown | None, found: Calibration | None, distances: Tensor) -> Tensor:
    """The most doubt about each input (samples,) if it is a known one: as a calibration found it, or the router's.

    distances (samples, tasks): the nearest task may have a limit of its own.
    """
    if found is not None and found.doubts is not None:
        return distances.new_tensor(found.doubts)[distances.argmin(-1)]
    shared = float("inf") if unknown is None else unknown.doubt if found is None or found.doubt is None else found.doubt
    return distances.new_full((len(distances),), shared)


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration of a bundle, if it has one. Raises SourceError for one that is damaged or of another bundle."""
    path, fix = folder / CALIBRATION_NAME, "calibrate again, or delete the file"
    if not path.is_file():
        return None
    try:
        calibration = Calibration.model_validate(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise SourceError(f"cannot be read ({str(error).splitlines()[0][:100]})", str(path), fix) from None
    if calibration.manifest != sha256_file(folder / MANIFEST_NAME):
        raise SourceError("was made for another bundle, or this one was made again", str(path), fix)
    return calibration
