"""A LoRA adapter as PEFT writes it: one file of factors, adapter_config.json, nothing that is the base's own.

Slots have room for as many directions as there may be. When all is written, what is not needed goes: directions that a
module does not have, and tensors that are what they are in the base.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mergetool.checkpoints.adapters.files import WEIGHTS_NAME
from mergetool.checkpoints.adapters.settings import CONFIG_NAME
from mergetool.checkpoints.adapters.written import Written, config_text
from mergetool.errors import MergeError, at
from mergetool.outputs.record import LOST, RANK, Record
from mergetool.outputs.redaction import redacted
from mergetool.planning import Plan, Step
from mergetool.planning.adapters import is_product, module_of
from mergetool.planning.graph import BASE, Shard, Slot
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.io import bytes_of
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource, SafetensorsSource
from mergetool.tensors.writer import SlotWriter, write_file

_CHUNK = 1 << 22
_LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class _Kept:
    """A tensor of the finished file, and the slot that its first bytes come from."""

    spec: TensorSpec
    slot: str


def slot_files(plan: Plan) -> Sequence[Shard]:
    """The file of factors, with room for all that may be."""
    return plan.shards


def write_beside(plan: Plan, folder: Path, record: Record) -> None:
    """The file without what is not needed, and what PEFT reads beside it. Raises MergeError where nothing is left."""
    with closing(SafetensorsSource([folder / WEIGHTS_NAME], None)) as written:
        ranks = {step.name: int(_measured(record, step, RANK)) for step in plan.steps if is_product(step)}
        saved = _saved(plan, written)
        if not any(ranks.values()) and not saved:
            what = "nothing of the base is changed, so there is nothing to put into an adapter"
            raise MergeError(what, "output.kind", "name models that differ from the base")
        if ranks and not any(ranks.values()):
            ranks[next(iter(ranks))] = 1  # of zeros: PEFT opens no adapter without any
        kept = [each for step in plan.steps for each in _kept(step, ranks, saved)]
        shard = Shard(f".{WEIGHTS_NAME}.tmp", *lay_out([each.spec for each in kept], {"format": "pt"}))
        _copy(written, folder, shard, kept)
    (folder / shard.name).replace(folder / WEIGHTS_NAME)
    record.outputs.pop(WEIGHTS_NAME, None)
    write_file(folder / CONFIG_NAME, _config(plan, ranks, saved))


def notes(plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
    """What the ranks lose."""
    lost = {step.name: _measured(record, step, LOST) for step in plan.steps if is_product(step)}
    losing = [share for share in lost.values() if share]
    if not losing:
        return {}
    worst = max(lost, key=lost.__getitem__)
    return {f"cut to the rank: up to {max(losing):.2g} of the length of a change is lost ({worst})": len(losing)}


def _measured(record: Record, step: Step, what: str) -> float:
    return next((note[1] for note in record.notes.get(step.name, ()) if note[0] == what), 0.0)


def _saved(plan: Plan, written: ModelSource) -> dict[str, set[str]]:
    """The modules that are kept in full, because a tensor of theirs is not the base's: with what PEFT calls them by."""
    base = plan.sources[BASE]
    changed: dict[str, set[str]] = {}
    for step in plan.steps:
        if is_product(step) or not _differs(base, step.name, written, step.slots[0].spec):
            continue
        for slot in step.slots:
            module, leaf = module_of(slot.spec.name), slot.spec.name.rpartition(".")[2]
            if leaf not in _LEAVES:
                what = "is changed, and an adapter holds layers and modules, not single parameters"
                fix = f"keep the base's: overrides: [{{match: {step.name!r}, use: base}}], or write kind: checkpoint"
                raise MergeError(what, step.name, fix)
            changed.setdefault(module, set()).add(leaf)
    return changed


def _differs(base: ModelSource, name: str, written: ModelSource, spec: TensorSpec) -> bool:
    """Whether a stored tensor is another one than the base's, stored alike."""
    if name not in base.specs:
        return True
    known, size = base.specs[name], spec.num_elements
    return any(
        not _equal(base, known, written, spec, start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)
    )


def _equal(
    base: ModelSource, known: TensorSpec, written: ModelSource, spec: TensorSpec, start: int, stop: int
) -> bool:
    import torch

    halves = []
    for source, each in ((base, known), (written, spec)):
        stored = torch.empty(stop - start, dtype=torch_dtype(each.dtype))
        source.read_bytes(each.name, start * each.dtype.bits // 8, bytes_of(stored))
        halves.append(stored.to(torch_dtype(spec.dtype)))
    return torch.equal(*halves)


def _kept(step: Step, ranks: Mapping[str, int], saved: Mapping[str, set[str]]) -> Iterator[_Kept]:
    """What of a step's slots goes into the finished file."""
    if not is_product(step):
        full = step.slots if any(module_of(slot.spec.name) in saved for slot in step.slots) else ()
        yield from (_Kept(slot.spec, slot.spec.name) for slot in full)
    elif ranks[step.name]:
        yield from (_Kept(_cut(slot, ranks[step.name]), slot.spec.name) for slot in step.slots)


def _cut(slot: Slot, rank: int) -> TensorSpec:
    """A factor with as many directions as there are."""
    spec, shape = slot.spec, slot.spec.shape
    cut = (rank, *shape[1:]) if ".lora_A." in spec.name else (shape[0], rank, *shape[2:])
    return TensorSpec(spec.name, spec.dtype, cut)


def _copy(written: ModelSource, folder: Path, shard: Shard, kept: Sequence[_Kept]) -> None:
    writer = SlotWriter(folder, [shard])
    try:
        for each in kept:
            for begin in range(0, each.spec.num_bytes, _CHUNK):
                chunk = memoryview(bytearray(min(_CHUNK, each.spec.num_bytes - begin)))
                written.read_bytes(each.slot, begin, chunk)
                writer.write(0, each.spec.name, begin, chunk)
        writer.sync()
    finally:
        writer.close()


def _config(plan: Plan, ranks: Mapping[str, int], saved: Mapping[str, set[str]]) -> str:
    """adapter_config.json."""
    recipe, base = plan.recipe, plan.sources[BASE]
    assert recipe.base is not None
    origin = plan.origins.get(BASE, ())
    name = recipe.output.base or (origin[0].repo if origin and origin[0].repo else recipe.base.source)
    made = Written(
        ranks={module_of(step.slots[0].spec.name): ranks[step.name] for step in plan.steps if is_product(step)},
        saved=saved,
        modules=frozenset(name.rpartition(".")[0] for name in base.specs),
        base=str(redacted(name, recipe.folder)),
        revision=origin[0].commit if origin and origin[0].repo and recipe.output.base is None else None,
        transposed=any(step.operation.transposed for step in plan.steps),
    )
    return config_text(made, read_config(base.folder))
