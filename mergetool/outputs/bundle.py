"""A bundle: base, factors of every expert, heads, router and manifest, all written by the stage that makes factors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergetool.outputs.record import Record
from mergetool.planning import Plan
from mergetool.planning.graph import Shard
from mergetool.units import filesize


def slot_files(plan: Plan) -> Sequence[Shard]:
    """None: how large the files get is known when the factors are."""
    return ()


def write_beside(plan: Plan, folder: Path, record: Record) -> None:
    """The manifest knows the hash of every file, so nothing more may come."""


def notes(plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
    """What the factors take of the whole, and experts whose inputs the router cannot tell apart."""
    factors = sum((folder / shard.name).stat().st_size for shard in plan.shards)
    written = sum((folder / file.name).stat().st_size for file in plan.files)
    return {
        f"factors of all experts: {filesize(factors)} of {filesize(written)}": 1,
        **dict.fromkeys(record.remarks, 1),
    }
