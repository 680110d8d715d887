"""Is a checkpoint what a recipe says? Every tensor is merged again and held against the checkpoint; nothing is written.

yes           every tensor is the recipe's, bit for bit or to one rounding of the dtype that it is stored in
no            some are not, or are missing, or there are others
cannot tell   the recipe cannot be followed here, or a yes and a no would look the same
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mergetool.bundle import is_bundle
from mergetool.checkpoints.quantised import how_quantised
from mergetool.engine.comparing import Compared, ComparingSink, settle
from mergetool.engine.context import Context
from mergetool.engine.logs import MemoryLog
from mergetool.engine.opposites import Matched, matched
from mergetool.engine.partition import Partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.processes import Team
from mergetool.engine.run import Flags, Progress, Silent, run_inner
from mergetool.engine.schedule import Schedule
from mergetool.engine.sinks import MemorySink, Sink
from mergetool.engine.stages import run_stages
from mergetool.engine.trust import check_trust
from mergetool.errors import HubError, MergeError, MergetoolError, OutputError, PlanError, SourceError
from mergetool.layouts.experts import GATES
from mergetool.methods.base import Method
from mergetool.outputs.push import read_lock
from mergetool.planning import Plan, make_plan
from mergetool.planning.cost import estimate
from mergetool.planning.graph import Slot
from mergetool.planning.inner import inside
from mergetool.planning.sources import Lookup
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import BY_NAME
from mergetool.tensors.folder import is_adapter, open_model
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

Answer = Literal["yes", "no", "cannot tell"]
_VERDICTS = ("same", "rounded", "near", "different")
_SHOWN = 20
_MANY = 100
"""Units in the last place that are no matter of rounding."""


@dataclass(frozen=True)
class Agreement:
    """Whether a checkpoint is what a recipe says, and why."""

    path: Path
    recipe: str
    answer: Answer
    reason: str
    fix: str = ""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """How many are the same, rounded, near, different."""
    worst: tuple[Compared, ...] = ()
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def error(self) -> MergetoolError | None:
        """What a command ends with, unless the answer is yes."""
        if self.answer == "yes":
            return None
        if self.answer == "no":
            return SourceError(f"is not what {self.recipe} says: {self.reason}", str(self.path), self.fix)
        return MergeError(f"cannot tell whether it is what {self.recipe} says: {self.reason}", str(self.path), self.fix)

    def as_dict(self) -> dict[str, Any]:
        """The answer as JSON-able data."""
        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "answer": self.answer,
            "exit_code": 0 if self.error is None else self.error.exit_code,
            "reason": self.reason,
            "fix": self.fix,
            "tensors": dict(self.tensors),
            "problems": list(self.problems),
            "differing": [each.as_dict() for each in self.worst],
            "remarks": list(self.remarks),
        }


def verify_against(
    path: Path, recipe: Recipe, flags: Flags | None = None, progress: Progress | None = None
) -> Agreement:
    """Whether the checkpoint at `path` is what `recipe` says; of `flags`, workers, memory and trust count.

    Raises SourceError for a checkpoint that cannot be read, RecipeError for code that is not trusted.
    """
    flags, progress = flags or Flags(), progress or Silent()
    check_trust(recipe, trusted=flags.trust_code)
    if (reason := _beyond_us(path, recipe)) is not None:
        return Agreement(path, recipe.name, "cannot tell", *reason)
    with closing(open_model(path)) as found, tempfile.TemporaryDirectory(prefix="mergetool-verify-") as folder:
        if (how := how_quantised(found)) is not None:
            fix = "dequantise it first, or verify the checkpoint that it was made from"
            return Agreement(path, recipe.name, "cannot tell", f"its weights are quantised ({how})", fix)
        check = _Check(path, found, recipe, flags, progress)
        try:
            return check.answer(Path(folder) / "result")
        except (SourceError, PlanError, MergeError, OutputError, HubError) as error:
            if check.is_of_checkpoint(error):
                raise
            where = f"{error.where}: " if error.where else ""
            return Agreement(path, recipe.name, "cannot tell", f"{where}{error.what}", error.fix)


def _beyond_us(path: Path, recipe: Recipe) -> tuple[str, str] | None:
    """Why nothing can be compared, and what to do instead."""
    method = recipe.method.method_name()
    if is_bundle(path):
        return "it is a bundle of experts, which holds no merged weights", f"mergetool verify {path}"
    if is_adapter(path):
        return "it is an adapter, not a checkpoint", "merge it into its base first: adapters: [ADAPTER]"
    if recipe.method.searches:
        return f"{method} searches for its numbers", "give the recipe that it wrote beside its result"
    if recipe.method.result == "bundle":
        return f"{method} leaves a bundle, not a checkpoint", f"mergetool verify {path}"
    return None


class _Check:
    """One checkpoint, and one recipe."""

    def __init__(self, path: Path, found: ModelSource, recipe: Recipe, flags: Flags, progress: Progress) -> None:
        self._path, self._found, self._recipe = path, found, recipe
        self._flags, self._progress = flags, progress
        self._broken: MergetoolError | None = None

    def is_of_checkpoint(self, error: MergetoolError) -> bool:
        """Whether it is the checkpoint that is wrong, not what the recipe needs."""
        return error is self._broken

    def answer(self, output: Path) -> Agreement:
        plan = self._plan(output)
        try:
            run_inner(plan, {}, self._flags, self._progress, Team())
            pairs = self._matched(plan)
            compared = self._compare(plan, pairs)
        finally:
            self._progress.stop()
            for source in plan.sources.values():
                source.close()
        return _Judged(self._path, plan, pairs, compared).agreement()

    def _plan(self, output: Path) -> Plan:
        lookup = Lookup(self._recipe.folder)
        plan = make_plan(self._recipe, output, lookup=lookup, whole=True)
        if plan.bytes_missing:
            lookup.fetch(self._progress.say)
            plan = make_plan(self._recipe, output, lookup=lookup, whole=True)
        return plan

    def _matched(self, plan: Plan) -> Matched:
        try:
            return matched(plan, self._found)
        except SourceError as error:
            self._broken = error
            raise

    def _compare(self, plan: Plan, pairs: Matched) -> Mapping[str, Compared]:
        """Merge again, and hold every slice against the checkpoint."""
        finishes = any(stage.name == "finish" for stage in plan.stages)
        made = _keeping(plan) if finishes else _unrounded(_keeping(plan))
        sink = ComparingSink(made, plan.specs, pairs.source, pairs.places)
        try:
            if finishes:  # such a method looks at what it has made, so this must be kept, as it would be stored
                merged = MemorySink(made)
                self._merge(made, merged)
                for name, tensor in merged.tensors.items():
                    sink.write(0, name, 0, bytes_of(tensor))
            else:
                self._merge(made, sink)
        except SourceError as error:
            self._broken = sink.broken if error is sink.broken else None
            raise
        return sink.compared

    def _merge(self, plan: Plan, sink: Sink) -> None:
        costs = estimate(plan, workers=self._flags.workers, memory=self._flags.memory)
        schedule = Schedule(costs.step_memory, costs.workers)
        pool = WorkerPool(plan, sink)
        run = Context(plan, sink, MemoryLog(), schedule, pool, Partition(), _Comparing(self._progress))
        with pool.ready("cpu", None), schedule.threads():
            run_stages(run)
            schedule.close()
            schedule.wait()


class _Comparing:
    """Tells what merging is for here."""

    def __init__(self, progress: Progress) -> None:
        self.advance, self.say = progress.advance, progress.say
        self._start = progress.start

    def start(self, total_bytes: int, label: str) -> None:
        self._start(total_bytes, "comparing" if total_bytes else label)


def _keeping(plan: Plan) -> Plan:
    """The same plan, which goes on where values are not finite: they are compared like all others."""
    check = plan.recipe.check.model_copy(update={"non_finite": "keep"})
    return replace(plan, recipe=replace(plan.recipe, check=check))


def _unrounded(plan: Plan) -> Plan:
    """The same plan, with results as they are computed."""
    wide = BY_NAME["F64" if plan.compute_bits == 64 else "F32"]

    def widened(slot: Slot) -> Slot:
        return replace(slot, spec=replace(slot.spec, dtype=wide)) if slot.spec.dtype.is_float else slot

    steps = (replace(step, slots=tuple(widened(slot) for slot in step.slots)) for step in plan.steps)
    return replace(plan, steps=tuple(steps))


class _Judged:
    """What all tensors together come to."""

    def __init__(self, path: Path, plan: Plan, pairs: Matched, compared: Mapping[str, Compared]) -> None:
        self._path, self._plan, self._pairs = path, plan, pairs
        every = list(compared.values())
        settle(every)
        self._counts = {word: sum(each.verdict == word for each in every) for word in _VERDICTS}
        self._total = len(every)
        self._off = sorted((each for each in every if each.beyond), key=lambda each: -each.worst)
        self._different = [each for each in self._off if each.verdict == "different"]
        self._seed = _seed_of(path)
        drawn = () if self._seed == plan.seed else self._of_drawn(pairs)
        self._drawn = {each.name for each in drawn}

    def agreement(self) -> Agreement:
        answer, reason, fix = self._decided()
        name, told = self._plan.recipe.name, {word: count for word, count in self._counts.items() if count}
        remarks = (*self._pairs.remarks, *self._remarks())
        return Agreement(
            self._path, name, answer, reason, fix, told, tuple(self._off[:_SHOWN]), tuple(self._pairs.problems), remarks
        )

    def _decided(self) -> tuple[Answer, str, str]:
        problems = self._pairs.problems
        known = [each for each in self._different if each.name not in self._drawn]
        again = f"to have what it says: mergetool run {self._plan.recipe.name} -o FOLDER"
        if problems or known:
            told = [*([self._told(known)] if known else []), *problems]
            return "no", "; ".join(told), again
        if self._different:
            return "cannot tell", *self._words_about_draws()
        if self._off:
            what = (
                f"{len(self._off)} of {self._total} tensors are off by more than one rounding of their dtype, by up to "
                f"{max(each.units for each in self._off):.2g} units in the last place, and much nearer to what the "
                "recipe makes than to any input: so a tool leaves them that computes in a narrow dtype"
            )
            return "cannot tell", what, again
        same, rounded = self._counts["same"], self._counts["rounded"]
        parts = [f"{same} bit for bit"] * bool(same) + [f"{rounded} to one rounding of their dtype"] * bool(rounded)
        return "yes", f"{self._total} tensors are what {self._plan.recipe.name} says ({', '.join(parts)})", ""

    def _told(self, known: list[Compared]) -> str:
        first = known[0]
        units = f", {first.units:.2g} units in the last place" if 0 < first.units < _MANY else ""
        return (
            f"{len(known)} of {self._total} tensors differ, most of all {first.name}: {first.beyond} of "
            f"{first.entries} entries, by up to {first.worst:.3g} (at flat index {first.place}: {first.found:.6g} "
            f"here, {first.expected:.6g} by the recipe{units})"
        )

    def _of_drawn(self, pairs: Matched) -> Iterator[Any]:
        """Tensors whose numbers the seed decides, or the measuring of gates."""
        if any(draws(step.operation.method) for plan in inside(self._plan).values() for step in plan.steps):
            yield from (each for places in pairs.places.values() for each in places)
        for step in self._plan.steps:
            if draws(step.operation.method) or any(operand.source == GATES for operand in step.operands):
                for slot in step.slots:
                    yield from pairs.places.get(slot.spec.name, ())

    def _words_about_draws(self) -> tuple[str, str]:
        seed = self._seed
        where = f"its lock says seed {seed}" if seed is not None else "nothing here says with which seed it was made"
        what = (
            f"{len(self._different)} of {self._total} tensors differ in what is drawn at random: the recipe's seed is "
            f"{self._plan.seed}, {where}"
        )
        return what, f"name the seed: --set compute.seed={'N' if seed is None else seed}"

    def _remarks(self) -> Iterator[str]:
        here = self._path.resolve()
        for name, source in self._plan.sources.items():
            if source.folder is not None and source.folder.resolve() == here:
                yield f"it is {name!r} of the recipe itself"


def draws(method: Method | None) -> bool:
    """Whether another seed gives another result."""
    for key in method.exempt if method is not None else ():
        law, _, option = key.partition(" ")
        name, _, value = option.partition("=")
        if law == "seed-free" and (not option or str(getattr(method, name)) == value):
            return True
    return False


def _seed_of(path: Path) -> int | None:
    """The seed that a checkpoint's lock tells."""
    try:
        seed = read_lock(path).get("seed")
    except SourceError:
        return None
    return seed if isinstance(seed, int) else None
