"""A router corrected by a few inputs whose tasks are known: `calibration.json` beside the manifest.

    mergetool calibrate out/bundle --input rows.jsonl          rows as for `mergetool route`, each with its `task`

Every task's distances get an offset, and all a temperature, fitted by maximum likelihood. The file names the manifest
that it was made for by its hash, and counts only with that. Deleting it takes the correction back.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mergetool.bundle.manifest import MANIFEST_NAME
from mergetool.errors import SourceError
from mergetool.tensors.io import sha256_file
from mergetool.tensors.writer import write_file

if TYPE_CHECKING:
    from mergetool.bundle.model import MassModel

CALIBRATION_NAME = "calibration.json"


class Calibration(BaseModel):
    """What is subtracted from the tasks' distances, in the order of the bundle's tasks, and what divides them then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: str
    """SHA-256 of the bundle's manifest."""
    offsets: tuple[float, ...]
    temperature: float
    num_rows: int


def calibrate(model: "MassModel", rows: Sequence[dict[str, Any]], batch_size: int = 32) -> Calibration:
    """Fit a calibration, write it into the bundle, and let the model use it.

    Raises SourceError for rows without a task, with one that the bundle does not hold, or where a task has no row.
    """
    import torch

    from mergetool.bundle.rows import inputs_of
    from mergetool.kernels.routing import fit_offsets

    where, names = "input", model.task_names
    for number, row in enumerate(rows, 1):
        if row.get("task") not in names:
            what = f"row {number} is of task {row.get('task')!r}"
            raise SourceError(what, where, f"name one of the tasks {', '.join(names)} in every row")
    if missing := [name for name in names if all(row["task"] != name for row in rows)]:
        raise SourceError(f"no row is of task {missing[0]!r}", where, "give some rows of every task")
    model.calibration = None
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    distances = torch.cat([model.route(**inputs_of(model, batch)).distances for batch in batches])
    offsets, temperature = fit_offsets(distances, torch.tensor([names.index(row["task"]) for row in rows]))
    found = Calibration(
        manifest=sha256_file(model.folder / MANIFEST_NAME),
        offsets=tuple(offsets.tolist()),
        temperature=temperature,
        num_rows=len(rows),
    )
    write_file(model.folder / CALIBRATION_NAME, found.model_dump_json(indent=1) + "\n")
    model.calibration = found
    return found


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration of a bundle, if it has one. Raises SourceError for one that is damaged or of another bundle."""
    path, fix = folder / CALIBRATION_NAME, "calibrate again, or delete the file"
    if not path.is_file():
        return None
    try:
        found = Calibration.model_validate(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise SourceError(f"cannot be read ({str(error).splitlines()[0][:100]})", str(path), fix) from None
    if found.manifest != sha256_file(folder / MANIFEST_NAME):
        raise SourceError("was made for another bundle, or this one was made again", str(path), fix)
    return found
