"""A LoRA adapter as PEFT writes it: one file of factors, adapter_config.json, nothing that is the base's own.

Slots have room for as many directions as there may be. When all is written, what is not needed goes: directions that a
module does not have, and tensors that are what they are in the base.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from mergetool.checkpoints.adapters.files import WEIGHTS_NAME
from mergetool.checkpoints.adapters.forms import Form, InFull, always_kept
from mergetool.checkpoints.adapters.keys import PREFIX
from mergetool.checkpoints.adapters.settings import CONFIG_NAME
from mergetool.checkpoints.adapters.written import Held, config_text
from mergetool.errors import MergeError
from mergetool.outputs.record import LOST, RANK, Record
from mergetool.outputs.redaction import redacted
from mergetool.planning import Plan, Step
from mergetool.planning.adapters import biases_of_zeros, is_added
from mergetool.planning.graph import BASE, Shard, Slot
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource, SafetensorsSource
from mergetool.tensors.writer import SlotWriter, write_file

_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Kept:
    """A tensor of the finished file, and the slot that its first bytes come from; zeros have none."""

    spec: TensorSpec
    slot: str | None


def slot_files(plan: Plan) -> Sequence[Shard]:
    """The file of factors, with room for all that may be."""
    return plan.shards


def write_beside(plan: Plan, folder: Path, record: Record) -> None:
    """The file without what is not needed, and what PEFT reads beside it. Raises MergeError where nothing is left."""
    with closing(SafetensorsSource([folder / WEIGHTS_NAME], None)) as written:
        ranks = {name: int(_measured(record, name, RANK)) for name, form in plan.forms.items() if form.is_product}
        ranks |= _of_attentions(ranks, plan.forms)
        saved = _changed_modules(plan, written)
        if not any(ranks.values()) and not saved:
            what = "nothing of the base is changed, so there is nothing to put into an adapter"
            raise MergeError(what, "output.kind", "name models that differ from the base")
        ranks |= dict.fromkeys(_of_zeros(ranks, saved, plan.forms), 1)
        saved |= always_kept(plan.forms, plan.about.task)
        wrapped = {plan.forms[name].target for name, rank in ranks.items() if rank}
        kept = [each for step in plan.steps for each in _kept(step, plan.forms[step.name], ranks, saved, wrapped)]
        layers = [step for step in plan.steps if ranks.get(step.name)]
        kept += [_Kept(spec, None) for spec in biases_of_zeros(layers, plan.forms, saved)]
        shard = Shard(f".{WEIGHTS_NAME}.tmp", *lay_out([each.spec for each in kept], {"format": "pt"}))
        if shard.header != plan.shards[0].header:
            _copy(written, folder, shard, kept)
            (folder / shard.name).replace(folder / WEIGHTS_NAME)
            record.outputs.pop(WEIGHTS_NAME, None)
    write_file(folder / CONFIG_NAME, _config(plan, ranks, saved))


def notes(plan: Plan, folder: Path, record: Record) -> Mapping[str, int]:
    """What the ranks lose."""
    lost = {name: _measured(record, name, LOST) for name, form in plan.forms.items() if form.is_product}
    losing = [share for share in lost.values() if share]
    if not losing:
        return {}
    worst = max(lost, key=lost.__getitem__)
    return {f"cut to the rank: up to {max(losing):.2g} of the length of a change is lost ({worst})": len(losing)}


def _measured(record: Record, name: str, what: str) -> float:
    return next((note[1] for note in record.notes.get(name, ()) if note[0] == what and not isinstance(note, str)), 0.0)


def _of_attentions(ranks: Mapping[str, int], forms: Mapping[str, Form]) -> dict[str, int]:
    """PEFT gives MultiheadAttention and its out_proj one rank: that of the one with more directions."""
    of_module = {form.target: name for name, form in forms.items() if form.is_product}
    pairs = [(name, of_module.get(form.around or "")) for name, form in forms.items()]
    return {each: max(ranks[one], ranks[two]) for one, two in pairs if two is not None for each in (one, two)}


def _of_zeros(ranks: Mapping[str, int], saved: Collection[str], forms: Mapping[str, Form]) -> list[str]:
    """What has no directions, and gets one: PEFT opens no adapter without any, and adds to no bias without."""
    at_biases = [name for name, rank in ranks.items() if not rank and forms[name].bias in saved]
    return at_biases if any(ranks.values()) else at_biases or list(ranks)[:1]


def _changed_modules(plan: Plan, written: ModelSource) -> set[str]:
    """The modules that are kept in full, because a tensor of theirs is not the base's; of biases alone, their names."""
    base = plan.sources[BASE]
    changed: set[str] = set()
    for step in plan.steps:
        form = plan.forms[step.name]
        if not form.is_product and _differs(base, step.name, written, step.slots[0].spec):
            changed |= {_holder(form, place) for place in form.places}
    return changed


def _holder(form: Form, place: InFull) -> str:
    """What decides whether a tensor is kept: its module, or itself."""
    return place.key if form.holds_alone(place) else place.module


def _differs(base: ModelSource, name: str, written: ModelSource, spec: TensorSpec) -> bool:
    """Whether a stored tensor is another one than the base's, stored alike."""
    if name not in base.specs:
        return True
    known, size = base.specs[name], spec.num_elements
    return any(
        not _equal(base, known, written, spec, start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)
    )


def _equal(base: ModelSource, known: TensorSpec, written: ModelSource, spec: TensorSpec, start: int, stop: int) -> bool:
    import torch

    halves = []
    for source, each in ((base, known), (written, spec)):
        stored = torch.empty(stop - start, dtype=torch_dtype(each.dtype))
        source.read_bytes(each.name, start * each.dtype.bits // 8, bytes_of(stored))
        halves.append(stored.to(torch_dtype(spec.dtype)))
    return torch.equal(*halves)


def _kept(
    step: Step, form: Form, ranks: Mapping[str, int], saved: Collection[str], wrapped: Collection[str]
) -> Iterator[_Kept]:
    """What of a step's slots goes into the finished file. PEFT wraps modules that have factors."""
    if form.is_product:
        rank = ranks[step.name]
        yield from (_Kept(_cut(slot, rank, form), slot.spec.name) for slot in step.slots if rank)
        return
    for slot, place in zip(step.slots, form.places, strict=True):
        if _holder(form, place) in saved:
            name = place.key if place.module in wrapped else place.key.replace(".base_layer.", ".")
            yield _Kept(replace(slot.spec, name=name), slot.spec.name)


def _cut(slot: Slot, rank: int, form: Form) -> TensorSpec:
    """A factor with as many directions as there are."""
    spec, shape = slot.spec, slot.spec.shape
    rank *= form.experts
    cut = (rank, *shape[1:]) if spec.name == form.a else (shape[0], rank, *shape[2:])
    return TensorSpec(spec.name, spec.dtype, cut)


def _copy(written: ModelSource, folder: Path, shard: Shard, kept: Sequence[_Kept]) -> None:
    writer = SlotWriter(folder, [shard])
    try:
        for each in kept:
            for begin in range(0, each.spec.num_bytes, _CHUNK):
                chunk = memoryview(bytearray(min(_CHUNK, each.spec.num_bytes - begin)))
                if each.slot is not None:
                    written.read_bytes(each.slot, begin, chunk)
                writer.write(0, each.spec.name, begin, chunk)
        writer.sync()
    finally:
        writer.close()


def _config(plan: Plan, ranks: Mapping[str, int], saved: Collection[str]) -> str:
    """adapter_config.json."""
    products = {name: form for name, form in plan.forms.items() if form.is_product and ranks[name]}
    held = Held(
        ranks={form.module: ranks[name] for name, form in products.items() if not form.parameter and not form.around},
        parameters={form.parameter: ranks[name] for name, form in products.items() if form.parameter},
        saved={place for place in saved if not place.startswith(PREFIX)},
        biases=any(place.startswith(PREFIX) and not is_added(place) for place in saved),
        added=any(map(is_added, saved)),
    )
    return config_text(replace(plan.about, base=redacted(plan.about.base, plan.recipe.folder)), held)
