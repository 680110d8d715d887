"""What corrects a bundle's router: `calibration.json` beside the manifest.

Every task's distances get an offset, and all a temperature. The file names the manifest that it was made for by its
hash, and counts only with that; so it names the examples beside it (`mergetool.bundle.examples`), of routers that tell
unknown inputs. Deleting it takes the correction back.
"""

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mergetool.bundle.manifest import MANIFEST_NAME
from mergetool.errors import SourceError
from mergetool.tensors.io import sha256_file

CALIBRATION_NAME = "calibration.json"
AGAIN = "calibrate again, or delete calibration.json"


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
    examples: str | None = None
    """SHA-256 of what that doubt comes from."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.doubt is None) != (self.examples is None):
            raise ValueError("doubt and examples come together")
        return self


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration of a bundle, if it has one. Raises SourceError for one that is damaged or of another bundle."""
    path = folder / CALIBRATION_NAME
    if not path.is_file():
        return None
    try:
        calibration = Calibration.model_validate(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise SourceError(f"cannot be read ({str(error).splitlines()[0][:100]})", str(path), AGAIN) from None
    if calibration.manifest != sha256_file(folder / MANIFEST_NAME):
        raise SourceError("was made for another bundle, or this one was made again", str(path), AGAIN)
    return calibration
