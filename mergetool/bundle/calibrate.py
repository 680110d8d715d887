"""Correct a router by a few inputs whose tasks are known.

    mergetool calibrate out/bundle --input rows.jsonl          rows as for `mergetool route`, each with its `task`

The offsets of the tasks' distances and the temperature are fitted by maximum likelihood; what unknown inputs look like,
of routers that tell them, is learnt beside (see `mergetool.bundle.learn`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from mergetool.bundle.calibration import CALIBRATION_NAME, Calibration
from mergetool.bundle.examples import EXAMPLES
from mergetool.bundle.learn import learn
from mergetool.bundle.manifest import MANIFEST_NAME
from mergetool.bundle.marks import check_tasks_of
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.rows import inputs_of, on_device_of
from mergetool.errors import SourceError
from mergetool.kernels.routing import fit_offsets
from mergetool.tensors.io import sha256_file
from mergetool.tensors.writer import write_file


def calibrate(model: MassModel, rows: Sequence[dict[str, Any]], batch_size: int = 32) -> Calibration:
    """Fit a calibration, write it into the bundle, and let the model use it.

    Raises SourceError for rows without a task, with one that the bundle does not hold, or where a task has no row.
    """
    where, names = "input", model.task_names
    check_tasks_of(rows, names)
    if missing := [name for name in names if all(row["task"] != name for row in rows)]:
        raise SourceError(f"no row is of task {missing[0]!r}", where, "give some rows of every task")
    _forget(model)
    batches = [inputs_of(model, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    distances = torch.cat([model.route(**on_device_of(model, batch)).distances.cpu() for batch in batches])
    tasks = torch.tensor([names.index(row["task"]) for row in rows])
    offsets, temperature = fit_offsets(distances, tasks)
    examples = None if model.knowing is None else learn(model, batches, tasks)
    calibration = Calibration(
        manifest=sha256_file(model.folder / MANIFEST_NAME),
        offsets=tuple(offsets.tolist()),
        temperature=temperature,
        num_rows=len(rows),
        doubt=None if examples is None else examples.most,
        examples=None if examples is None else sha256_file(model.folder / EXAMPLES),
    )
    text = calibration.model_dump_json(indent=1, exclude_none=True)
    write_file(model.folder / CALIBRATION_NAME, text + "\n")
    model.calibration = calibration
    if model.knowing is not None:
        model.knowing.examples = examples
        model.follow()
    return calibration


def _forget(model: MassModel) -> None:
    """Take an earlier calibration back, so that none is half overwritten if this one is killed."""
    model.calibration = None
    if model.knowing is not None:
        model.knowing.examples = None
    (model.folder / CALIBRATION_NAME).unlink(missing_ok=True)
