"""Bundle methods in the engine: the plan's models become a folder of factors, under the same staging as any result.

A run that is killed and started again finds the factors it had computed: they are kept in the unfinished folder under
the hash of their task vectors (or, with `cache`, in a folder that several runs share). Several processes share the
factors and the files that hold them; the leader does the rest.
"""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergetool.bundle.alike import Alike
from mergetool.bundle.kinds import build
from mergetool.bundle.manifest import Parameter
from mergetool.bundle.options import TAKING, Experts, HeadSource
from mergetool.bundle.present import OwnHead, PresentedSource
from mergetool.bundle.store import FactorStore
from mergetool.bundle.task_vector import Difference, Product, TaskVector, as_stored
from mergetool.engine.context import Context
from mergetool.engine.devices import free_device, load_linear_algebra, own_stream
from mergetool.engine.fit import WholeModels
from mergetool.kernels.subspace import searching
from mergetool.methods.base import expect
from mergetool.methods.families.bundle import BundleMethod
from mergetool.methods.group import Note
from mergetool.planning import Plan
from mergetool.planning.graph import BASE, Stage
from mergetool.tensors.digests import remembered_sha256
from mergetool.tensors.factors import Halves, nothing_added
from mergetool.tensors.source import is_same_tensor

_STORE = ".factors"
_MOST_PAIRS = 5
"""Pairs of experts alike that are named; `mergetool inspect` names all."""
_KEPT = {
    "svd": "kept as factors",
    "full": "kept in full",
    "mask": "kept as masks of one change",
    "skip": "unchanged in every expert",
}
_I = TypeVar("_I")
_T = TypeVar("_T")


class WholeExperts(WholeModels, Experts):
    """The opened models of a plan, as a bundle's build sees them."""

    def __init__(self, run: Context) -> None:
        plan = run.plan
        super().__init__(plan, run.teller.say, run.team, torch.device(run.pool.device))
        load_linear_algebra(self.device)
        self.names = tuple(plan.recipe.models)
        self.sources = plan.sources
        merged = [step for step in plan.steps if step.operation.arithmetic]
        self.shapes = {step.name: step.spec.shape for step in merged}
        self._stand_ins = {
            (model, step.name): operand.source
            for step in merged
            for model, operand in zip(step.operation.models, step.models, strict=True)
        }
        self.heads: Mapping[str, HeadSource | OwnHead] = {
            name: head for name in self.names if (head := self._head(name, plan))
        }
        self._record = run.record
        self._teller = run.teller

    def _head(self, name: str, plan: Plan) -> HeadSource | OwnHead | None:
        """The head that the recipe names, or that the expert brings."""
        if (given := plan.recipe.models[name].head) is not None:
            return HeadSource(self.path(given.weights), given.pool, given.normalize, given.labels)
        source = plan.sources[name]
        return source.head if isinstance(source, PresentedSource) else None

    @property
    def leads(self) -> bool:
        return self.team.leads

    def share(
        self, call: Callable[[_I], _T], items: Sequence[_I], num_threads: int = 1, label: str = TAKING
    ) -> list[_T]:
        base = self.sources[BASE].specs
        sizes = {item: len(self.names) * base[str(item)].num_bytes for item in items if str(item) in self.shapes}
        telling = threading.Lock()

        def told(item: _I) -> _T:
            with searching() as searches:
                result = self._computed(call, item)
            with telling:
                self._record.note(str(item), searches.notes)
                self._teller.advance(sizes.get(item, 0))
            return result

        self._teller.start(sum(sizes.values()) // self.team.size, label)
        return self.team.share(told, items, num_threads)

    def _computed(self, call: Callable[[_I], _T], item: _I) -> _T:
        """`call` of an item, once more on the CPU where the device has too little memory for it."""
        try:
            with own_stream(self.device):
                return call(item)
        except torch.OutOfMemoryError:
            free_device(self.device)
        self._teller.say(f"{self.device} has too little memory: {item} is computed on the CPU")
        with self.on_cpu():
            return call(item)

    def read(self, model: str, name: str) -> Tensor:
        return super().read(self._stand_ins.get((model, name), BASE), name)

    def change(self, model: str, name: str) -> TaskVector:
        """What a model changed: adapters on the very base tell it by themselves, and no weight is read."""
        base = self.sources[BASE]
        source = self.sources[self._stand_ins.get((model, name), BASE)]
        shape = self.shapes[name]
        if source is base:
            return self._product(nothing_added(shape), shape)
        if source.origin is not source and is_same_tensor(source.origin, base, name) and (kept := source.kept(name)):
            return as_stored(kept, shape, self.device)
        halves = source.factors(name) if is_same_tensor(source.origin, base, name) else None
        if halves is not None:
            return self._product(halves, shape)
        return Difference(self.read(model, name).sub_(self._base(name)), (model, name))

    def _base(self, name: str) -> Tensor:
        """The base's tensor, which all experts ask for in turn; not to be changed."""
        asked = name, self.device
        if getattr(self._here, "asked", None) != asked:
            self._here.asked, self._here.base = asked, self.read(BASE, name)
        base: Tensor = self._here.base
        return base

    def _product(self, halves: Halves, shape: tuple[int, ...]) -> Product:
        b, a = halves
        return Product(b.to(self.device), a.to(self.device), shape)

    @property
    def leaving(self) -> Path | None:
        past = self._plan.recipe.past.place
        return past if past is not None and past == self._plan.output else None

    def met(self, pairs: Sequence[Alike]) -> None:
        lost = "inputs of one may be answered by the other; leave one out, or merge them first"
        self._record.remarks += [f"{pair}: {lost}" for pair in pairs[:_MOST_PAIRS]]

    def provenance(self, task: str) -> tuple[str, Mapping[str, str]]:
        known = self._plan.recipe.past.tasks.get(task)
        return super().provenance(task) if known is None else (known.source, known.files)

    def digests(self, model: str) -> Mapping[str, str]:
        digests = {}
        for stamp in self.sources[model].files:
            path = str(stamp.path)
            if path not in self._record.inputs:
                self._record.inputs[path] = remembered_sha256(stamp.path)
            digests[stamp.path.name] = self._record.inputs[path]
        return digests


class FactoriseStage:
    """The stage that takes models apart and writes a bundle into the sink's folder."""

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run

    def work(self) -> None:
        run, folder = self._run, self._run.sink.folder
        assert folder is not None
        method = expect(run.plan.recipe.method, BundleMethod)
        experts = WholeExperts(run)
        run.record.resumed = any((folder / _STORE).glob("*.safetensors"))
        run.record.bytes_read = sum(stamp.size for source in run.plan.sources.values() for stamp in source.files)
        store = run.team.leader_first(lambda: self._emptied(folder))
        manifest = build(experts, folder, store, method.options(), run.schedule.num_threads)
        if manifest is None:
            return
        shutil.rmtree(folder / _STORE, ignore_errors=True)
        run.record.outputs |= manifest.files
        for name, parameter in manifest.parameters.items():
            run.record.note(name, _notes(parameter))

    def _emptied(self, folder: Path) -> FactorStore:
        """The store of factors; what else an earlier try wrote into `folder` goes."""
        for path in [path for path in folder.iterdir() if path.name != _STORE] if self._run.team.leads else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self._run.pool.store or FactorStore(folder / _STORE)


def _notes(parameter: Parameter) -> list[Note]:
    """What became of a tensor."""
    kept = _KEPT[parameter.policy]
    measured = parameter.interference
    return [kept] if measured is None else [kept, ("interference between tasks", measured)]
