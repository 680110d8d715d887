"""The results of a sweep, checkpoints or adapters in one folder, each whole with a card and a lock of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergetool.outputs import adapter, checkpoint
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
        own = record_of(plan, name, record)
        kind, known = adapter if each.forms else checkpoint, set(own.outputs)
        kind.write_beside(each, folder / name, own)
        for file in known - own.outputs.keys():
            del record.outputs[f"{name}/{file}"]


def notes(plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
    """What is to be said of adapters as a whole; of checkpoints, tensors say it."""
    told = {name: adapter.notes(each, folder / name, record_of(plan, name, record)) for name, each in _adapters(plan)}
    return {f"{name}: {note}": count for name, notes in told.items() for note, count in notes.items()}


def _adapters(plan: Plan) -> Iterator[tuple[str, Plan]]:
    return ((name, each) for name, each in plan.points.items() if each.forms)


def record_of(plan: Plan, name: str, record: Record) -> Record:
    """What a run learnt, of one of its results."""
    begin = f"{name}/"
    outputs = {file.removeprefix(begin): digest for file, digest in record.outputs.items() if file.startswith(begin)}
    told = {tensor: notes_about(name, plan.points, each) for tensor, each in record.notes.items()}
    return replace(record, outputs=outputs, notes=told)
