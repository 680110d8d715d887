"""What a finished run leaves, one file for each kind, and the last steps that all kinds share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

from mergetool.outputs.lock import describe_run, same_content, summary
from mergetool.outputs.record import Record, peak_memory
from mergetool.outputs.result import Result
from mergetool.outputs.staging import Staging
from mergetool.outputs.sweep import record_of
from mergetool.planning import Plan
from mergetool.planning.graph import Shard
from mergetool.planning.key import plan_key
from mergetool.tensors.writer import sync_folder


class OutputKind(Protocol):
    """One kind of output; a module of this room."""

    def slot_files(self, plan: Plan) -> Sequence[Shard]:
        """The files whose slots stages fill; they get their size before any work."""
        ...

    def write_beside(self, plan: Plan, folder: Path, record: Record) -> None:
        """Everything but the weights, the card and the lock. Files that are written anew lose their digests."""
        ...

    def notes(self, plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
        """Remarks about the whole output, for people: how many tensors each is about."""
        ...


def output_of(plan: Plan) -> OutputKind:
    """The kind of output that a plan asks for."""
    module: OutputKind = import_module(f"mergetool.outputs.{plan.recipe.result}")
    return module


def finish(plan: Plan, staging: Staging, records: Sequence[Record], seconds: float) -> Result:
    """Write everything but the weights into the unfinished folder; the lock comes last."""
    folder, output = staging.partial, output_of(plan)
    record = Record.of(records)
    output.write_beside(plan, folder, record)
    written = sum((folder / file.name).stat().st_size for file in plan.files)
    result = Result(
        path=staging.output,
        seconds=seconds,
        bytes_read=record.bytes_read,
        bytes_written=written,
        peak_memory=peak_memory() + record.workers_memory,
        num_tensors=plan.num_tensors,
        resumed=staging.journal.resumed or record.resumed,
        num_processes=len(records),
        notes={**output.notes(plan, folder, record), **summary(record.notes)},
        warnings=(*plan.warnings, *same_content(plan, record.inputs)),
        results=tuple(staging.output / name for name in plan.points),
    )
    for name, each in plan.points.items():
        alone = replace(result, path=staging.output / name)
        describe_run(each, folder / name, plan_key(each), record_of(plan, name, record), alone)
        sync_folder(folder / name)
    describe_run(plan, folder, staging.key, record, result)
    return result
