"""Several checkpoints in one folder, each whole with a card and a lock of its own: the results of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergetool.outputs import checkpoint
from mergetool.outputs.record import Record
from mergetool.planning import Plan
from mergetool.planning.graph import Shard
from mergetool.planning.sweep import notes_about


def slot_files(plan: Plan) -> Sequence[Shard]:
    """The weights of all results."""
    return plan.shards


def write_beside(plan: Plan, folder: Path, record: Record) -> None:
    """What belongs to each of them."""
    for name, each in plan.points.items():
        checkpoint.write_beside(each, folder / name, record)


def notes(plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
    """Tensors say all that is to be said."""
    return {}


def record_of(plan: Plan, name: str, record: Record) -> Record:
    """What a run learnt, of one of its results."""
    begin = f"{name}/"
    outputs = {file.removeprefix(begin): digest for file, digest in record.outputs.items() if file.startswith(begin)}
    told = {tensor: notes_about(name, plan.points, each) for tensor, each in record.notes.items()}
    return replace(record, outputs=outputs, notes=told)
