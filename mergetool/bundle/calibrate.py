"""Correct a router by a few inputs whose tasks are known.

    mergetool calibrate out/bundle --input rows.jsonl          rows as for `mergetool route`, each with its `task`

The offsets of the tasks' distances and the temperature are fitted by maximum likelihood.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergetool.bundle.calibration import CALIBRATION_NAME, Calibration
from mergetool.bundle.manifest import MANIFEST_NAME
from mergetool.bundle.marks import check_tasks_of
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.rows import inputs_of, on_device_of
from mergetool.errors import SourceError
from mergetool.kernels.routing import fit_offsets
from mergetool.tensors.io import sha256_file
from mergetool.tensors.writer import write_file

_REFUSED = 0.01
"""Share of known rows that may count as unknown."""
_KNOWN_BEFORE = 400
"""Rows that weigh as much as a limit which held without any, and which they do not contradict."""
_OF_ANOTHER_KIND = 0.2
"""Share of a task's rows from which on a limit that refuses them is not for inputs of its kind."""
_CONTRADICTION = 0.05
"""Share of known rows from which on a limit that refuses them was wrong."""


def _most(doubt: Tensor, before: float) -> float:
    """The most doubt about a known input, by that about some rows and the limit that held without them."""
    told = doubt[doubt.isfinite()]
    found = float(told.quantile(1 - _REFUSED)) if len(told) else before
    if float((doubt > before).float().mean()) > _CONTRADICTION:
        return found
    return (len(doubt) * found + _KNOWN_BEFORE * before) / (len(doubt) + _KNOWN_BEFORE)  # hundredths of few are chance


def limits(doubt: Tensor, nearest: Tensor, before: float, count: int) -> tuple[float, tuple[float, ...] | None]:
    """The most doubt about known rows; and by nearest task, where the limit is not for inputs of some tasks' kinds.

    Pixels, or measurements, are no text: what is strange to others is usual there, and the other way round.
    """
    rows = [doubt[nearest == task] for task in range(count)]
    apart = [len(each) > 0 and float((each > before).float().mean()) > _OF_ANOTHER_KIND for each in rows]
    others = torch.cat([each for each, own in zip(rows, apart, strict=True) if not own] or [doubt])
    shared = _most(others, before)
    if not any(apart):
        return shared, None
    return shared, tuple(_largest(each, shared) if own else shared for each, own in zip(rows, apart, strict=True))


def _largest(doubt: Tensor, least: float) -> float:
    """The most doubt about some rows, of a hundred or more but for their hundredth part."""
    told = doubt[doubt.isfinite()]
    return max(least, float(told.quantile(1 - _REFUSED, interpolation="higher"))) if len(told) else least


def calibrate(model: MassModel, rows: Sequence[dict[str, Any]], batch_size: int = 32) -> Calibration:
    """Fit a calibration, write it into the bundle, and let the model use it.

    Raises SourceError for rows without a task, with one that the bundle does not hold, or where a task has no row.
    """
    where, names = "input", model.task_names
    check_tasks_of(rows, names)
    if missing := [name for name in names if all(row["task"] != name for row in rows)]:
        raise SourceError(f"no row is of task {missing[0]!r}", where, "give some rows of every task")
    model.calibration = None
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    routed = [model.route(**on_device_of(model, inputs_of(model, batch))) for batch in batches]
    distances = torch.cat([each.distances.cpu() for each in routed])
    offsets, temperature = fit_offsets(distances, torch.tensor([names.index(row["task"]) for row in rows]))
    shared, own = None, None
    if (unknown := model.unknown) is not None:
        doubt, nearest = torch.cat([each.doubt.cpu() for each in routed]), (distances - offsets.float()).argmin(-1)
        shared, own = limits(doubt, nearest, unknown.doubt, len(names))
    calibration = Calibration(
        manifest=sha256_file(model.folder / MANIFEST_NAME),
        offsets=tuple(offsets.tolist()),
        temperature=temperature,
        num_rows=len(rows),
        doubt=shared,
        doubts=own,
    )
    text = calibration.model_dump_json(indent=1, exclude_none=True)
    write_file(model.folder / CALIBRATION_NAME, text + "\n")
    model.calibration = calibration
    return calibration
