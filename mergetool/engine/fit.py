"""Fitted methods in the engine: fit once, keep the result beside the output, and read every model through it."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergetool.alignment.models import Fitted
from mergetool.engine.context import Context
from mergetool.engine.devices import free_device, load_linear_algebra
from mergetool.engine.processes import Team
from mergetool.errors import MergeError
from mergetool.kernels.sums import all_finite
from mergetool.methods.base import expect
from mergetool.methods.families.fitted import FittedMethod
from mergetool.planning import Plan
from mergetool.planning.graph import BASE, Stage
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import FileStamp, ModelSource, read_whole

_I = TypeVar("_I")
_T = TypeVar("_T")


class WholeModels:
    """The opened models of a plan, tensor by tensor, on the device that computes."""

    def __init__(self, plan: Plan, say: Callable[[str], None], team: Team, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._here = threading.local()
        self.team = team
        self.say = say
        headers = plan.headers
        self.names = headers.names
        self.shapes = headers.shapes
        self.config = headers.config
        self.architecture = headers.architecture
        first = plan.sources[self.names[0]]
        self.folder = first.tokenizer_folder or first.folder

    @property
    def device(self) -> torch.device:
        """Where this thread computes."""
        device: torch.device = getattr(self._here, "device", self._device)
        return device

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """While inside, this thread computes on the CPU."""
        self._here.device = torch.device("cpu")
        try:
            yield
        finally:
            del self._here.device

    def shapes_of(self, model: str) -> Mapping[str, tuple[int, ...]]:
        specs = self._plan.sources[model].specs
        return {name: specs[name].shape for name in self.shapes}

    def read(self, model: str, name: str) -> Tensor:
        tensor = read_whole(self._plan.sources[model], name).to(self.compute, copy=True)
        if not all_finite(tensor):
            label = "base" if model == BASE else f"model {model!r}"
            raise MergeError("holds values that are not finite", f"{label}: {name}", "repair or replace that model")
        return tensor.to(self.device)

    def share(self, call: Callable[[_I], _T], items: Sequence[_I]) -> Iterable[_T]:
        """`call` of every item, in order: shared with the other processes, or else as the results are asked for."""
        return map(call, items) if self.team.size == 1 else self.team.share(call, items)

    @property
    def compute(self) -> torch.dtype:
        """The compute dtype of the run."""
        return _compute(self._plan)

    def path(self, text: str) -> Path:
        return self._plan.recipe.path_of(text)


def _compute(plan: Plan) -> torch.dtype:
    return torch.float64 if plan.compute_bits == 64 else torch.float32


def with_room(models: WholeModels, call: Callable[[], _T]) -> _T:
    """`call`, once more on the CPU where the models' device has too little memory for it.

    Raises MergeError where other processes have a part in it, which may have got further.
    """
    load_linear_algebra(models.device)
    try:
        return call()
    except torch.OutOfMemoryError:
        if models.team.size > 1:
            what = f"{models.device} has too little memory to align these models"
            raise MergeError(what, "--device", "use --device cpu") from None
    free_device(models.device)
    models.say(f"{models.device} has too little memory: aligned on the CPU")
    with models.on_cpu():
        return call()


class FittedSource(ModelSource):
    """A model seen through a fit: the same names and shapes, entries moved to the common space."""

    def __init__(self, source: ModelSource, fitted: Fitted, model: str) -> None:
        self._source = source
        self._fitted = fitted
        self._model = model
        self._last = threading.local()
        self.folder = source.folder
        self.specs: Mapping[str, TensorSpec] = {name: fitted.shown(spec) for name, spec in source.specs.items()}

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._source.files

    def position(self, name: str) -> tuple[int, int]:
        return self._source.position(name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if getattr(self._last, "name", None) != name:  # one tensor is read in several slices, one after the other
            tensor = self._fitted.apply(self._model, name, read_whole(self._source, name))
            self._last.name, self._last.data = name, bytes_of(tensor.contiguous().reshape(-1))
        buffer[:] = self._last.data[begin : begin + len(buffer)]

    def will_need(self, name: str, begin: int, length: int) -> None:
        self._source.will_need(name, 0, self._source.specs[name].num_bytes)

    def close(self) -> None:
        self._source.close()


class MergedModel(Mapping[str, Tensor]):
    """The merged model, tensor by tensor, in compute dtype; a fresh copy each time."""

    def __init__(self, source: ModelSource, compute: torch.dtype) -> None:
        self._source = source
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return read_whole(self._source, name).to(self._compute, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs)

    def __len__(self) -> int:
        return len(self._source.specs)


class FitStage:
    """The stage that looks at whole models. After it, every operand is read in the common space.

    The sink's folder, if it has one, keeps what was found, and may hold that of a killed run.
    """

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run

    def work(self) -> None:
        run, team = self._run, self._run.team
        run.teller.start(0, "aligning models")
        with run.pool.resting(team.local_size):
            models = WholeModels(run.plan, run.teller.say, team, torch.device(run.pool.device))
            method, folder = expect(run.plan.recipe.method, FittedMethod), run.sink.folder
            fitted = method.load(models, folder) if folder is not None else None
            if not all(team.all_gather(fitted is not None)):  # nobody looks any more
                fitted = with_room(models, lambda: method.fit(models))
                if folder is not None and team.leads:
                    fitted.save(folder)
        assert fitted is not None
        run.fitted = models, fitted
        run.show({name: FittedSource(source, fitted, name) for name, source in run.plan.sources.items()})


class FinishStage:
    """The stage that replaces tensors of the merged model, when all of it is written."""

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run

    def work(self) -> None:
        team = self._run.team
        if team.size > 1:
            self._run.sink.sync()
        team.all_gather(None)
        team.leader_first(lambda: self._replace() if team.leads else None)
        self._run.hashes.settle()

    def _replace(self) -> None:
        assert self._run.fitted is not None
        models, fitted = self._run.fitted
        assert isinstance(models, WholeModels)
        with closing(self._run.sink.source()) as source:
            merged = MergedModel(source, _compute(self._run.plan))
            method = expect(self._run.plan.recipe.method, FittedMethod)
            finished = with_room(models, lambda: method.finish(models, fitted, merged, self._run.sink.folder))
            self._run.pool.new().replace(finished)
        self._run.sink.sync()  # who hashes it may be on another machine
