"""Is a checkpoint what a recipe says? Every tensor is merged again and held against the checkpoint; nothing is written.

yes           every tensor is the recipe's, bit for bit or to one rounding of the dtype that it is stored in
no            some are not, or are missing, or there are others
cannot tell   the recipe cannot be followed here, or a yes and a no would look the same
"""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from mergetool.bundle import is_bundle
from mergetool.bundle.changes import BundleChanges
from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.checkpoints.quantised import how_quantised
from mergetool.engine.adapters_against import compare_adapters
from mergetool.engine.bundle_against import compare_bundles
from mergetool.engine.comparing import Compared, ComparingSink
from mergetool.engine.context import Context
from mergetool.engine.logs import MemoryLog
from mergetool.engine.opposites import Matched, matched
from mergetool.engine.partition import Partition
from mergetool.engine.pool import WorkerPool
from mergetool.engine.processes import Team
from mergetool.engine.progress import Progress, Silent
from mergetool.engine.run import Flags, run_inner, run_recipe
from mergetool.engine.schedule import Schedule
from mergetool.engine.sinks import MemorySink, Sink
from mergetool.engine.stages import run_stages
from mergetool.engine.trust import check_trust
from mergetool.engine.verdict import Agreement, Judged, drawn_tensors
from mergetool.errors import HubError, MergeError, MergetoolError, OutputError, PlanError, SourceError
from mergetool.planning import Plan, make_plan
from mergetool.planning.cost import estimate
from mergetool.planning.graph import Slot
from mergetool.planning.sources import Lookup
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import BY_NAME
from mergetool.tensors.folder import is_adapter, open_model
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import ModelSource

_OF_RECIPE = (SourceError, PlanError, MergeError, OutputError, HubError)
"""What may go wrong with what a recipe needs."""


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
    if recipe.result in ("adapter", "bundle"):
        return _made_and_held(path, recipe, flags, progress)
    with closing(open_model(path)) as found, tempfile.TemporaryDirectory(prefix="mergetool-verify-") as folder:
        if (how := how_quantised(found)) is not None:
            fix = "dequantise it first, or verify the checkpoint that it was made from"
            return Agreement(path, recipe.name, "cannot tell", f"its weights are quantised ({how})", fix)
        check = _Check(path, found, recipe, flags, progress)
        try:
            return check.answer(Path(folder) / "result")
        except _OF_RECIPE as error:
            if check.is_of_checkpoint(error):
                raise
            return _not_followed(path, recipe, error)


def _not_followed(path: Path, recipe: Recipe, error: MergetoolError) -> Agreement:
    """The recipe is sound, and it cannot be followed here."""
    where = f"{error.where}: " if error.where else ""
    return Agreement(path, recipe.name, "cannot tell", f"{where}{error.what}", error.fix)


def _made_and_held(path: Path, recipe: Recipe, flags: Flags, progress: Progress) -> Agreement:
    """The same for a recipe that makes an adapter or a bundle, which is made; what both add to weights is compared."""
    if recipe.result == "adapter" and not is_adapter(path):
        fix = "to ask whether it has the adapter in it: models: {merged: {source: BASE, adapters: [ADAPTER]}}"
        return Agreement(path, recipe.name, "no", "it is no adapter, and the recipe makes one", fix)
    compare = _of_adapters if recipe.result == "adapter" else _of_bundles
    with tempfile.TemporaryDirectory(prefix="mergetool-verify-") as folder:
        asked = replace(flags, output=Path(folder) / "result", push=False)
        try:
            run_recipe(recipe, asked, progress)
        except _OF_RECIPE as error:
            return _not_followed(path, recipe, error)
        pairs, compared = compare(Path(folder) / "result", path)
        plan = make_plan(recipe, asked.output)
        return Judged(path, plan, pairs, compared, compared.keys() if drawn_tensors(plan) else ()).agreement()


def _of_adapters(made: Path, found: Path) -> tuple[Matched, dict[str, Compared]]:
    with closing(AdapterAlone(found)) as theirs, closing(AdapterAlone(made)) as ours:
        return compare_adapters(ours, theirs)


def _of_bundles(made: Path, found: Path) -> tuple[Matched, dict[str, Compared]]:
    return compare_bundles(BundleChanges(made), BundleChanges(found))


def _beyond_us(path: Path, recipe: Recipe) -> tuple[str, str] | None:
    """Why nothing can be compared, and what to do instead."""
    method = recipe.method.method_name()
    if is_bundle(path) and recipe.result != "bundle":
        return "it is a bundle of experts, which holds no merged weights", f"mergetool verify {path}"
    if is_adapter(path) and recipe.result == "checkpoint":
        return "it is an adapter, not a checkpoint", "merge it into its base first: adapters: [ADAPTER]"
    if recipe.points:
        what = f"the recipe is a sweep with {len(recipe.points)} results"
        if all((path / name).is_dir() for name in recipe.points):
            return f"{what}, and this is their folder", f"mergetool verify {path}"
        return what, f"compare with one of them: mergetool diff {path} SWEEP/{next(iter(recipe.points))}"
    if recipe.method.searches:
        return f"{method} searches for its numbers", "give the recipe that it wrote beside its result"
    if recipe.result == "bundle" and not is_bundle(path):
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
        drawn = {each.name for name in drawn_tensors(plan) for each in pairs.places.get(name, ())}
        return Judged(self._path, plan, pairs, compared, drawn).agreement()

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
            self._broken = next((each for each in sink.broken if each is error), None)
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

    def start(self, total: int, label: str, unit: str = "B") -> None:
        self._start(total, "comparing" if total and unit == "B" else label, unit)


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
