"""Fitted methods in the engine: fit once, keep the result beside the output, and read every model through it."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergetool.engine.processes import Team
from mergetool.errors import MergeError
from mergetool.methods.base import Fitted, FittedMethod
from mergetool.planning import Plan
from mergetool.planning.graph import BASE
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import FileStamp, ModelSource

_I = TypeVar("_I")
_T = TypeVar("_T")


class WholeModels:
    """The opened models of a plan, tensor by tensor."""

    def __init__(self, plan: Plan, say: Callable[[str], None], team: Team) -> None:
        self._plan = plan
        self.team = team
        self.say = say
        headers = plan.headers
        self.names = headers.names
        self.shapes = headers.shapes
        self.config = headers.config
        self.architecture = headers.architecture

    def read(self, model: str, name: str) -> Tensor:
        tensor = _read_stored(self._plan.sources[model], name).to(self.compute, copy=True)
        if not bool(torch.isfinite(tensor).all()):
            label = "base" if model == BASE else f"model {model!r}"
            raise MergeError("holds values that are not finite", f"{label}: {name}", "repair or replace that model")
        return tensor

    def share(self, call: Callable[[_I], _T], items: Sequence[_I]) -> Iterable[_T]:
        """`call` of every item, in order: shared with the other processes, or else as the results are asked for."""
        return map(call, items) if self.team.size == 1 else self.team.share(call, items)

    @property
    def compute(self) -> torch.dtype:
        """The compute dtype of the run."""
        return torch.float64 if self._plan.compute_bits == 64 else torch.float32

    def path(self, text: str) -> Path:
        return self._plan.recipe.path_of(text)


def _read_stored(source: ModelSource, name: str) -> Tensor:
    spec = source.specs[name]
    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    source.read_bytes(name, 0, bytes_of(tensor.reshape(-1)))
    return tensor


class FittedSource(ModelSource):
    """A model seen through a fit: the same names and shapes, entries moved to the common space."""

    def __init__(self, source: ModelSource, fitted: Fitted, model: str) -> None:
        self._source = source
        self._fitted = fitted
        self._model = model
        self._last = threading.local()
        self.folder = source.folder
        self.specs: Mapping[str, TensorSpec] = source.specs

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._source.files

    def position(self, name: str) -> tuple[int, int]:
        return self._source.position(name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if getattr(self._last, "name", None) != name:  # one tensor is read in several slices, one after the other
            tensor = self._fitted.apply(self._model, name, _read_stored(self._source, name))
            self._last.name, self._last.data = name, bytes_of(tensor.contiguous().reshape(-1))
        buffer[:] = self._last.data[begin : begin + len(buffer)]

    def will_need(self, name: str, begin: int, length: int) -> None:
        self._source.will_need(name, begin, length)

    def close(self) -> None:
        self._source.close()


class MergedModel(Mapping[str, Tensor]):
    """The merged model, tensor by tensor, in compute dtype; a fresh copy each time."""

    def __init__(self, source: ModelSource, compute: torch.dtype) -> None:
        self._source = source
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return _read_stored(self._source, name).to(self._compute, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs)

    def __len__(self) -> int:
        return len(self._source.specs)


@dataclass(frozen=True)
class Fit:
    """A plan with every model seen through its fit, and what the fit knows about the merged model."""

    plan: Plan
    models: WholeModels | None = None
    fitted: Fitted | None = None

    @property
    def finishes(self) -> bool:
        """Whether tensors are replaced once everything is merged."""
        method = self.plan.recipe.method
        return isinstance(method, FittedMethod) and method.finishes()

    def finish(self, source: ModelSource, folder: Path | None) -> Mapping[str, Tensor]:
        """The tensors to replace in the merged model, which `source` holds."""
        method = self.plan.recipe.method
        assert isinstance(method, FittedMethod)
        assert self.models is not None
        assert self.fitted is not None
        merged = MergedModel(source, self.models.compute)
        return method.finish(self.models, self.fitted, merged, folder)


def fit(plan: Plan, folder: Path | None, say: Callable[[str], None], team: Team) -> Fit:
    """The plan with every model seen through its fit. `folder` keeps the fit, and may hold that of a killed run."""
    method = plan.recipe.method
    if not isinstance(method, FittedMethod):
        return Fit(plan)
    models = WholeModels(plan, say, team)
    fitted = method.load(models, folder) if folder is not None else None
    if not all(team.all_gather(fitted is not None)):  # nobody looks any more
        fitted = method.fit(models)
        if folder is not None and team.leads:
            fitted.save(folder)
    assert fitted is not None
    sources = {name: FittedSource(source, fitted, name) for name, source in plan.sources.items()}
    return Fit(replace(plan, sources=sources), models, fitted)
