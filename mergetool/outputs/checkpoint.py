"""A checkpoint: files of weights, their index, and what transformers and other libraries need to open them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergetool.outputs.record import Record
from mergetool.planning import Plan
from mergetool.planning.graph import Shard
from mergetool.planning.outcome import write_small_files
from mergetool.tensors.writer import copy_file, write_file


def slot_files(plan: Plan) -> Sequence[Shard]:
    """All weights are slots."""
    return plan.shards


def write_beside(plan: Plan, folder: Path, record: Record) -> None:
    """Index, config.json as it is true of the result, and all files that belong to it."""
    _write_index(plan, folder)
    write_small_files(plan, folder, copy_file)


def notes(plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
    """Tensors say all that is to be said."""
    return {}


def _write_index(plan: Plan, folder: Path) -> None:
    if len(plan.shards) == 1:
        return
    weight_map = {name: shard.name for shard in plan.shards for name in shard.header.slots}
    total = sum(spec.num_bytes for spec in plan.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    stem = plan.sources[plan.template].stem
    write_file(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
