"""One thread's workbench: reads slices, calls the method, checks, casts, writes. Its buffers are made once.

For methods that may see a slice at a time, a slice is about 256 Ki elements: every operation then runs on data that
is still in the processor's cache, which is where the speed comes from. Memory is the same however large a tensor is.
What is different on a device is in `device_worker`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from mergetool.bundle.store import FactorStore
from mergetool.engine.folding import OneByOne
from mergetool.engine.measured import Measured
from mergetool.engine.shelf import Shelves
from mergetool.engine.sinks import Sink
from mergetool.engine.stash import Stash
from mergetool.engine.storable import lost_in, within
from mergetool.engine.swept import Sweeping, told_of_overflow
from mergetool.errors import MergeError, at
from mergetool.methods.base import Params, StatisticsPass, Stats, TensorGroup
from mergetool.methods.group import Note, Shelf
from mergetool.outputs.record import INFINITE, KEPT_WIDE, LOST, NOT_FINITE, RANK
from mergetool.planning.graph import SLICE_ELEMENTS, Operand, Plan, Step
from mergetool.planning.operations import Bench, Decompose, Merge
from mergetool.planning.parents import label
from mergetool.tensors.dtypes import BY_TORCH_NAME, torch_dtype
from mergetool.tensors.io import bytes_of

_MOST_VIEWS = 1024
_ROUNDING = 1e-9
"""What factors leave out of a change below this is no loss, but rounding."""
_VARIANCE = "running_var"
"""What batch norms call the variances that they divide by the roots of."""
_RUN = 1 << 14
"""Elements of a sample that lie together."""


class Worker(Sweeping, Bench[Step]):
    """Counts over units and makes them. Used by one thread at a time."""

    _device = torch.device("cpu")
    _one_by_one = True
    """Whether models are read when a method that goes through them comes to them."""
    shelves: Shelves | None = None
    """Where counts over the whole model leave what they make, if anywhere."""

    def __init__(self, plan: Plan, sink: Sink, store: FactorStore | None = None) -> None:
        self._plan = plan
        self._store = store
        self._sink = sink
        self._compute = torch.float64 if plan.compute_bits == 64 else torch.float32
        self._stash = Stash(plan.sources)
        self._length = SLICE_ELEMENTS
        self._buffers: dict[tuple[object, torch.dtype], Tensor] = {}
        self._views: dict[tuple[object, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._kept: dict[tuple[int, int], dict[object, Tensor]] | None = None
        """What passes over slices of the step in hand keep for its merge."""

    def count(self, step: Step, start: int, stop: int, counts: StatisticsPass) -> Tensor:
        """Summed counts of a pass over elements [start, stop) of a step."""
        return self._count(step, start, stop, counts)

    def _count(self, step: Step, start: int, stop: int, counts: StatisticsPass) -> Tensor:
        if isinstance(step.operation, Decompose) and step.operation.factored:
            from mergetool.engine.change import counted

            return counted(self._plan, step, step.operation, counts)
        step = sliced(step)
        slices = self._slices(step, start, stop) if counts.one_in == 1 else runs_of(step, start, stop, counts.one_in)
        params = Params(**step.operation.numbers)
        return counts.observe((self._group(step, begin, end) for begin, end in slices), params)

    def visit(self, step: Step, counts: StatisticsPass) -> tuple[Stats, list[Note], list[int]]:
        """Count over a step that is a single unit, and make it; also of how many elements each pass has read one.

        What a pass keeps is there for the merge, and so is much of what it has read.
        """
        ((start, stop),) = step.pieces()
        outcome: StatisticsPass | Stats = counts
        shares, self._kept = [], {} if step.operation.keeps else None
        try:
            with self._stash.keeping():
                while not isinstance(outcome, Mapping):
                    shares.append(outcome.one_in)
                    outcome = outcome.conclude(combined(outcome, [self.count(step, start, stop, outcome)]))
                return outcome, self.perform(step, start, stop, outcome), shares
        finally:
            self._kept = None

    def perform(self, step: Step, start: int, stop: int, stats: Stats) -> list[Note]:
        """Make and write elements [start, stop) of a step; returns what is to be noted about them."""
        return self._perform(step, start, stop, stats)

    def _perform(self, step: Step, start: int, stop: int, stats: Stats) -> list[Note]:
        notes: list[Note] = []
        if start == 0 and self._is_kept_wide(step):
            notes.append(KEPT_WIDE)
        for begin, end in self._slices(step, start, stop):
            if begin < end:
                step.operation.perform(self, step, begin, end, notes, stats)
        return notes

    def merge(self, step: Step, start: int, stop: int, notes: list[Note], operation: Merge, stats: Stats) -> None:
        """Have a method merge a slice."""
        self._finish(step, start, self.merged(step, start, stop, notes, operation, stats), notes)

    def _finish(self, step: Step, start: int, merged: Tensor, notes: list[Note]) -> None:
        if step.name.endswith(_VARIANCE):
            _check_variance(step.name, merged)
        self._put(step, start, merged, notes)

    def merged(self, step: Step, start: int, stop: int, notes: list[Note], operation: Merge, stats: Stats) -> Tensor:
        """What a method makes of a slice."""
        group = self._group(step, start, stop)
        group.notes = notes
        with at(f"{operation.name}: {step.name}"), told_of_overflow():
            merged = operation.method.merge(group, operation.params, stats)
        like = group.models[0] if group.base is None else group.base
        assert merged.shape == like.shape, f"{step.name}: a method must not change shapes"
        return merged

    def pair(self, step: Step, notes: list[Note], operation: Decompose, stats: Stats) -> None:
        """Make what a step changes of the base, and write it as two factors."""
        from mergetool.engine.change import factors, merged

        with at(f"{operation.name}: {step.name}"):
            if operation.factored:
                pair, lost = merged(self._plan, step, operation, notes, stats)
            else:
                changed = self._changed(sliced(step), notes, stats)
                self._check_change(changed, step)
                pair, lost = factors(changed.flatten(1), operation)
        notes += [(RANK, pair.a.shape[0] / operation.experts), *([(LOST, lost)] if lost > _ROUNDING else [])]
        for slot, half in zip(step.slots, (pair.a, pair.b / operation.times), strict=True):
            self._put(replace(step, slots=(slot,)), 0, half.to(self._compute), notes)

    def _changed(self, step: Step, notes: list[Note], stats: Stats) -> Tensor:
        """The whole result of a step without the base, in the compute dtype; made slice by slice where that may be."""
        changed = torch.empty(step.spec.shape, dtype=self._compute, device=self._device)
        flat = changed.view(-1)
        assert step.base is not None
        for start, stop in self._slices(step, 0, step.spec.num_elements):
            part = flat[start:stop]
            part.copy_(step.operation.values(self, step, start, stop, notes, stats).reshape(-1))
            part.sub_(self._read(step.base, start, (stop - start,), "base of a change"))
        return changed

    def _check_change(self, changed: Tensor, step: Step) -> None:
        """Raise MergeError for what has no factors, whatever `check.non_finite` says."""
        if within(changed, step.spec.dtype):
            return
        first = int((~torch.isfinite(changed).reshape(-1)).int().argmax())
        what = f"what is changed is not finite at flat index {first}{self._culprit(step, first)}"
        fix = f"repair or replace that model, or keep the base's: overrides: [{{match: {step.name!r}, use: base}}]"
        raise MergeError(what, "", fix)

    def stored(self, step: Step, start: int, stop: int) -> Tensor:
        """Elements of the only operand."""
        return self._read(step.models[0], start, (stop - start,), 0)

    def _is_kept_wide(self, step: Step) -> bool:
        asked = self._plan.recipe.output.dtype
        return asked != "source" and step.spec.dtype.is_float and step.spec.dtype.bits > BY_TORCH_NAME[asked].bits

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors, checked and cast like merged ones, over what their steps wrote."""
        places = {slot.spec.name: (step, slot) for step in self._plan.steps for slot in step.slots}
        for name, tensor in tensors.items():
            step, slot = places[name]
            self._put(replace(step, slots=(slot,)), 0, tensor.to(self._device), [])

    def _slices(self, step: Step, start: int, stop: int) -> list[tuple[int, int]]:
        if step.row >= stop - start:
            return [(start, stop)]
        length = max(step.row, self._length // step.row * step.row)
        return [(begin, min(begin + length, stop)) for begin in range(start, stop, length)]

    def _group(self, step: Step, start: int, stop: int, owner: str = "") -> TensorGroup:
        length = stop - start
        shape: tuple[int, ...] = (length,)
        if step.operation.granularity(step.spec) != "element":
            shape = (length // step.row, *step.spec.shape[1:]) if step.row < step.spec.num_elements else step.spec.shape
        base = None if step.base is None else self._read(step.base, start, shape, (owner, "base"))
        models = self._models(step, start, shape, owner)
        return TensorGroup(
            name=step.key,
            shape=step.spec.shape,
            names=step.operation.models,
            base=base,
            models=models,
            start=start,
            seed=self._plan.seed,
            new=self._scratch(shape),
            other=partial(self._other, step),
            store=self._store,
            measured=Measured(self._plan, step, start, shape, self._read) if step.is_measured else None,
            shelf=self._shelf(step),
            kept=None if self._kept is None else self._kept.setdefault((start, stop), {}),
            room=partial(self._stash.keep, shape, self._compute) if self._recalls(step) else None,
        )

    def _models(self, step: Step, start: int, shape: tuple[int, ...], owner: str) -> list[Tensor]:
        recalls = self._recalls(step)

        def read(place: int, room: int) -> Tensor:
            return self._read(step.models[place], start, shape, (owner, room), keep=not recalls)

        count = len(step.models)
        if recalls:
            return cast("list[Tensor]", OneByOne(lambda place: read(place, place), range(count)))
        if self._one_by_one and step.operation.folds and count > 2:
            return cast("list[Tensor]", OneByOne(lambda place: read(place, min(place, 1)), range(count)))
        return [read(place, place) for place in range(count)]

    def _recalls(self, step: Step) -> bool:
        return self._one_by_one and self._kept is not None and step.operation.recalls

    def _shelf(self, step: Step) -> Shelf | None:
        """Where what a count makes of a whole tensor waits for its merge."""
        if self.shelves is None or not step.operation.counts_model or step.granularity != "tensor":
            return None
        return self.shelves.of(step.index)

    def _other(self, step: Step, name: str) -> TensorGroup | None:
        """A whole tensor that a step's method asks for, in buffers of its own."""
        if name not in step.partners:
            return None
        other = self._plan.steps[step.partners[name]]
        return self._group(other, 0, other.spec.num_elements, name)

    def _scratch(self, shape: tuple[int, ...]) -> Callable[[str, torch.dtype], Tensor]:
        return lambda name, dtype: self._buffer(("scratch", name), shape, dtype)

    def _buffer(self, place: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory: kept between calls for slices, fresh for whole tensors (freed with their group).

        Views are kept, too: making one gives up the interpreter's lock, for which threads then wait for one another.
        """
        length = math.prod(shape)
        if length > SLICE_ELEMENTS:
            return torch.empty(shape, dtype=dtype, device=self._device)
        view = self._views.get((place, dtype, shape))
        if view is None:
            if (place, dtype) not in self._buffers:
                self._buffers[place, dtype] = torch.empty(SLICE_ELEMENTS, dtype=dtype, device=self._device)
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[place, dtype, shape] = self._buffers[place, dtype][:length].view(shape)
        return view

    def _read(
        self, operand: Operand, start: int, shape: tuple[int, ...], place: object, *, keep: bool = True
    ) -> Tensor:
        """Elements from `start` on of an operand, in this shape and compute dtype, in this place's buffer."""
        name, length = operand.tensor, math.prod(shape)
        values = self._buffer(place, shape, self._compute)
        model = self._plan.sources[operand.source]
        dtype = model.specs[name].dtype
        itemsize = dtype.bits // 8
        if torch_dtype(dtype) == self._compute:
            model.read_bytes(name, start * itemsize, bytes_of(values))
            return values
        for begin in range(0, length, SLICE_ELEMENTS):
            count = min(SLICE_ELEMENTS, length - begin)
            part = self._stash.read(operand, start + begin, count, keep=keep)
            if count == length:
                values.copy_(part if values.dim() == 1 else part.view(shape))
            else:
                values.view(-1)[begin : begin + count].copy_(part)
        return values

    def _put(self, step: Step, start: int, merged: Tensor, notes: list[Note]) -> None:
        """Check that the values survive storage, cast once, write."""
        dtype = step.spec.dtype
        flat = merged if merged.dim() == 1 else merged.reshape(-1)
        if not within(flat, dtype):
            shared = self._shared_infinities(step, start, len(flat))
            flat = torch.where(shared != 0, shared, flat)
            self._judge(step, start, flat, notes, shared != 0)
        stored = flat
        if flat.dtype != torch_dtype(dtype):
            stored = self._buffer("out", (len(flat),), torch_dtype(dtype)).copy_(flat)
        self._store_at(step, start * dtype.bits // 8, stored.contiguous())

    def _store_at(self, step: Step, begin: int, stored: Tensor) -> None:
        """Write what is rounded already, from this byte of the tensor on."""
        self._write(step, begin, bytes_of(stored))

    def copy(self, step: Step, start: int, stop: int, notes: list[Note]) -> None:
        """An operand as it is: bit for bit, or cast where another storage dtype is asked for."""
        (operand,) = step.models
        stored = self._plan.spec(operand).dtype
        if stored.is_float:
            values = self._read(operand, start, (stop - start,), 0)
            if stored != step.spec.dtype:
                self._put(step, start, values, notes)
                return
            if not within(values, stored):
                self._judge(step, start, values, notes, values == -math.inf)  # a mask is copied as it is
        begin, end = start * stored.bits // 8, stored.num_bytes(stop)
        for offset in range(begin, end, len(self._stash.room)):
            chunk = self._stash.room[: min(len(self._stash.room), end - offset)]
            self._plan.sources[operand.source].read_bytes(operand.tensor, offset, chunk)
            self._write(step, offset, chunk)

    def _write(self, step: Step, begin: int, data: memoryview) -> None:
        """Into every slot of a step."""
        for slot in step.slots:
            self._sink.write(slot.shard, slot.spec.name, begin, data)

    def _judge(self, step: Step, start: int, values: Tensor, notes: list[Note], meant: Tensor | None = None) -> None:
        """Count what would not be finite once stored, and stop or note it, as the recipe says; not what is `meant`."""
        dtype = step.spec.dtype
        bad = lost_in(values, dtype)
        if meant is not None and bool(meant.any()):
            bad &= ~meant
            notes.append(INFINITE)
        count = int(bad.sum())
        if count == 0:
            return
        if self._plan.recipe.check.non_finite == "keep":
            notes.append(NOT_FINITE)
            return
        first = start + int(bad.nonzero()[0])
        culprit = self._culprit(step, first) or self._culprit_elsewhere(step)
        overflow = "" if culprit else f" (its largest finite {dtype.name} value is {dtype.largest:g})"
        raise MergeError(
            f"{count} values are not finite, the first at flat index {first}{culprit}{overflow}",
            step.spec.name,
            "repair or replace that model, or set check.non_finite: keep"
            if culprit
            else "set output.dtype: float32, or smaller weights; or check.non_finite: keep",
        )

    def _shared_infinities(self, step: Step, start: int, length: int) -> Tensor:
        """The infinities that several inputs share, as masks do (they are no numbers to merge), and 0 elsewhere."""
        read = (self._read(operand, start, (length,), ("shared", place)) for place, operand in enumerate(step.operands))
        first, *others = read
        shared = torch.isinf(first) if others else torch.zeros_like(first, dtype=torch.bool)
        for values in others:
            shared &= values == first
        return torch.where(shared, first, torch.zeros((), dtype=first.dtype, device=first.device))

    def _culprit(self, step: Step, index: int) -> str:
        """Whose value it is: at that place, or, as norms and angles spread it, anywhere in the tensor."""
        total = step.spec.num_elements
        slices = ((begin, min(SLICE_ELEMENTS, total - begin)) for begin in range(0, total, SLICE_ELEMENTS))
        for begin, length in ((index, 1), *slices):
            for operand in step.operands:
                bad = ~torch.isfinite(self._read(operand, begin, (length,), "culprit"))
                if bool(bad.any()):
                    place = "" if length == 1 else f" at flat index {begin + int(bad.nonzero()[0])}"
                    return f": it is not finite in {label(operand.source)}{place}"
        return ""

    def _culprit_elsewhere(self, step: Step) -> str:
        """Whose value it is, as what is counted over the whole model spreads it from another tensor."""
        if not step.operation.counts_model:
            return ""
        culprits = ((other, self._culprit(other, 0)) for other in self._plan.steps if other.operation.counts_model)
        return next((f"{culprit} of {other.spec.name}" for other, culprit in culprits if culprit), "")


def sliced(step: Step) -> Step:
    """A step as it is done slice by slice, where more follows."""
    return step if step.operation.sliced is step.operation else replace(step, operation=step.operation.sliced)


def _check_variance(name: str, values: Tensor) -> None:
    """Raise MergeError for variances below zero: a batch norm takes their roots, and everything becomes NaN."""
    lowest = float(values.min())
    if lowest < 0:
        fix = f"use a smaller scale, or copy them: overrides: [{{match: '*{_VARIANCE}', use: MODEL}}]"
        raise MergeError(f"a variance of {lowest:.3g}: every answer would be NaN", name, fix)


def runs_of(step: Step, start: int, stop: int, one_in: int) -> list[tuple[int, int]]:
    """A sample of one in `one_in` of the elements [start, stop), in runs long enough to be worth reading."""
    length = max(step.row, _RUN // step.row * step.row)
    return [(begin, min(begin + length, stop)) for begin in range(start, stop, length * one_in)]


def combined(counts: StatisticsPass, parts: Iterable[Tensor]) -> Tensor:
    """All partial counts of a pass, always in the order given: sums of floats depend on it."""
    waiting = iter(parts)
    if counts.joined:
        return torch.cat(list(waiting))
    total = next(waiting)
    for other in waiting:
        total.add_(other)
    return total
