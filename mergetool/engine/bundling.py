"""Bundle methods in the engine: the plan's models become a folder of factors, under the same staging as any result.

A run that is killed and started again finds the factors it had computed: they are kept in the unfinished folder under
the hash of their task vectors (or, with `cache`, in a folder that several runs share). Several processes share the
factors and the files that hold them; the leader does the rest.
"""

import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from mergetool.bundle.build import build
from mergetool.bundle.manifest import Manifest
from mergetool.bundle.options import Experts, HeadSource
from mergetool.bundle.present import OwnHead, PresentedSource
from mergetool.bundle.store import FactorStore
from mergetool.engine.devices import one_thread
from mergetool.engine.fit import WholeModels
from mergetool.engine.processes import Team
from mergetool.methods.base import BundleMethod
from mergetool.outputs.lock import describe_run, same_content
from mergetool.outputs.record import Record
from mergetool.outputs.result import Result
from mergetool.outputs.staging import Staging
from mergetool.planning import Plan
from mergetool.planning.graph import BASE
from mergetool.tensors.digests import remembered_sha256
from mergetool.units import filesize

_STORE = ".factors"
_I = TypeVar("_I")
_T = TypeVar("_T")


class WholeExperts(WholeModels, Experts):
    """The opened models of a plan, as a bundle's build sees them."""

    def __init__(self, plan: Plan, say: Callable[[str], None], team: Team) -> None:
        super().__init__(plan, say, team)
        self.names = tuple(plan.recipe.models)
        self.sources = plan.sources
        merged = [step for step in plan.steps if step.method is not None]
        self.shapes = {step.spec.name: step.spec.shape for step in merged}
        self._stand_ins = {
            (model, step.spec.name): source
            for step in merged
            for model, source in zip(step.models, step.sources, strict=True)
        }
        found = {name: self._head(name, plan) for name in self.names}
        self.heads: Mapping[str, HeadSource | OwnHead] = {name: head for name, head in found.items() if head}
        self.inputs: dict[str, str] = {}
        """SHA-256 of every input file hashed so far, by path."""

    def _head(self, name: str, plan: Plan) -> HeadSource | OwnHead | None:
        """The head that the recipe names, or that the expert brings."""
        if (given := plan.recipe.models[name].head) is not None:
            return HeadSource(self.path(given.weights), given.pool, given.normalize, given.labels)
        source = plan.sources[name]
        return source.head if isinstance(source, PresentedSource) else None

    @property
    def leads(self) -> bool:
        return self.team.leads

    def share(self, call: Callable[[_I], _T], items: Sequence[_I], num_threads: int = 1) -> list[_T]:
        return self.team.share(call, items, num_threads)

    def read(self, model: str, name: str) -> Tensor:
        return super().read(self._stand_ins.get((model, name), BASE), name)

    def digests(self, model: str) -> Mapping[str, str]:
        found = {}
        for stamp in self.sources[model].files:
            path = str(stamp.path)
            if path not in self.inputs:
                self.inputs[path] = remembered_sha256(stamp.path)
            found[stamp.path.name] = self.inputs[path]
        return found


def run_bundle(
    plan: Plan, staging: Staging, workers: int, *, cache: Path | None, say: Callable[[str], None], team: Team
) -> Result | None:
    """Build a bundle in the claimed folder and publish it; None in a process that does not lead."""
    started = time.monotonic()
    method = plan.recipe.method
    assert isinstance(method, BundleMethod)
    experts = WholeExperts(plan, say, team)
    folder = staging.partial
    resumed = staging.journal.found and any((folder / _STORE).glob("*.safetensors"))
    store = team.leader_first(lambda: _emptied(folder, cache, team))
    with one_thread():
        manifest = build(experts, folder, store, method.options(), workers)
    if manifest is None:
        return None
    shutil.rmtree(folder / _STORE, ignore_errors=True)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    result = Result(
        path=staging.output,
        seconds=time.monotonic() - started,
        bytes_read=sum(stamp.size for source in plan.sources.values() for stamp in source.files),
        bytes_written=written,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        num_tensors=len(manifest.parameters),
        resumed=resumed,
        num_processes=team.size,
        notes=_notes(manifest, written, folder),
        warnings=(*plan.warnings, *same_content(plan, experts.inputs)),
    )
    describe_run(plan, staging, Record(inputs=experts.inputs), result)
    staging.publish()
    return result


def _emptied(folder: Path, cache: Path | None, team: Team) -> FactorStore:
    """The store of factors; what else an earlier try wrote into `folder` goes."""
    for path in [path for path in folder.iterdir() if path.name != _STORE] if team.leads else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return FactorStore(cache or folder / _STORE)


def _notes(manifest: Manifest, written: int, folder: Path) -> dict[str, int]:
    """Remarks for people: what became of the tensors, and what it all weighs."""
    policies = [parameter.policy for parameter in manifest.parameters.values()]
    factors = sum((folder / task.factors).stat().st_size for task in manifest.tasks)
    notes = {f"factors of all experts: {filesize(factors)} of {filesize(written)}": 1}
    notes |= {"kept as factors": policies.count("svd"), "kept in full": policies.count("full")}
    return {note: count for note, count in notes.items() if count}
