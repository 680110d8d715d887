"""Task vectors as steps down the loss: for tasks with data, each task vector beside the gradient at the base.

The network of a task at the base is the task's own head on the base's body; the head stays as it is. Losses are means
over rows. `kernels.gradients` says what is computed.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mergetool.arch.heads import embeds, is_general
from mergetool.bundle.present import counterparts
from mergetool.engine.measure import running
from mergetool.errors import SourceError
from mergetool.kernels.differences import cosine, ratio
from mergetool.kernels.gradients import Descent, descent
from mergetool.outputs.difference import layer_and_role
from mergetool.planning.cost import room_to_measure
from mergetool.planning.measures import measuring
from mergetool.recipe.data import Data
from mergetool.recipe.schema import Compute
from mergetool.statistics.examples import Example
from mergetool.statistics.gradient import SQUARED, LossGradient, losses
from mergetool.statistics.measure import Measuring, measured
from mergetool.statistics.store import StatisticStore
from mergetool.tensors.dtypes import BY_NAME, torch_dtype
from mergetool.tensors.folder import open_model
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource, SafetensorsSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Row = dict[str, Any]
Rows = dict[str, list[Row]]
_PIECE = 1 << 22
"""Elements that are compared at a time."""
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Where losses are looked at along a merge, in lengths of its change."""


@dataclass(frozen=True)
class FineTune:
    """A model: its own head, and what of it is the base's body by another training."""

    name: str
    source: ModelSource
    body: Mapping[str, str]
    """The base's name of every tensor that moved, by the model's own."""

    @classmethod
    def of(cls, name: str, source: ModelSource, base: ModelSource) -> "FineTune":
        met = {own: theirs for theirs, own in counterparts(base, source).items() if source.specs[own].dtype.is_float}
        main = Counter(own.partition(".")[0] for own in source.specs).most_common(1)[0][0]
        (kind, *_) = read_config(source.folder).get("architectures") or [""]
        head = {own for own in met if own.partition(".")[0] != main and not embeds(own) and not is_general(str(kind))}
        return cls(name, source, {own: theirs for own, theirs in met.items() if own not in head})


class OnBody(ModelSource):
    """A task's network on another body: what is not its head is read from elsewhere."""

    def __init__(self, task: FineTune, read: "Callable[[str], Tensor]", dtype: Callable[[str], str]) -> None:
        """`read` gives a tensor of the body by the base's name, `dtype` what that is stored as."""
        self._task, self._read_body = task, read
        self.folder, self.stem = task.source.folder, task.source.stem
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(spec, dtype=BY_NAME[dtype(task.body[name])]) if name in task.body else spec
            for name, spec in task.source.specs.items()
        }

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._task.source.files

    @property
    def tokenizer_folder(self) -> Path | None:
        return self._task.source.tokenizer_folder

    def position(self, name: str) -> tuple[int, int]:
        return self._task.source.position(name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if name not in self._task.body:
            self._task.source.read_bytes(name, begin, buffer)
            return
        buffer[:] = bytes_of(self._read_body(self._task.body[name]).reshape(-1))[begin : begin + len(buffer)]


class DescentStudy:
    """The models of a recipe, some of them with data of what they were trained for."""

    def __init__(
        self,
        base: ModelSource,
        sources: Mapping[str, ModelSource],
        data: Mapping[str, Path],
        cache: Path | None,
        device: "torch.device",
    ) -> None:
        """Raises SourceError or PlanError for data that do not fit."""
        self._base, self._store = base, StatisticStore(cache)
        self._running = running(str(device), room_to_measure(None))
        self._tasks = {name: FineTune.of(name, source, base) for name, source in sources.items()}
        self._asked = {name: self._measuring(name, path) for name, path in data.items()}

    def _measuring(self, name: str, path: Path) -> Measuring:
        """The gradient of a task's loss at the base."""
        at_base = OnBody(self._tasks[name], self._stored, lambda body: self._base.specs[body].dtype.name)
        return measuring(LossGradient(), at_base, Data(data=str(path.absolute())), Compute(), f"model {name!r}")

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows of all tasks."""
        return tuple(each for asked in self._asked.values() for each in asked.examples)

    def _stored(self, name: str) -> "Tensor":
        spec = self._base.specs[name]
        return read(self._base, name, 0, spec.num_elements).view(spec.shape)

    # ------------------------------------------------------------------ down from the base

    def rows(self, tell: Callable[[str], None]) -> Rows:
        """Task vectors beside gradients: whole, by layer, and of each task's loss with every task vector."""
        found: Rows = {"descent": [], "descent_by_layer": [], "crosstalk": []}
        for name, asked in self._asked.items():
            tell(f"following the loss of {name} down from the base, on {len(asked.examples)} rows")
            path = measured(asked, self._store, asked.key(), self._running, lambda _: None)
            with closing(SafetensorsSource([path], None)) as gradient:
                own = {other: self._beside(self._tasks[name], task, gradient) for other, task in self._tasks.items()}
            whole = {other: _sum(each) for other, each in own.items()}
            ends = [fmean(self.losses(name, model)) for model in (asked.model, self._tasks[name].source)]
            told = {"rows": len(asked.examples), "loss_base": ends[0], "loss_tuned": ends[1]}
            found["descent"].append({"model": name, **told, **_angles(whole[name], ends)})
            found["descent_by_layer"] += [
                {"model": name, "layer": layer, **_angles(each)} for layer, each in own[name].items()
            ]
            found["crosstalk"] += [
                {"loss": name, "model": other, "crosstalk": _share(each.product, whole[name].product)}
                for other, each in whole.items()
            ]
        return found

    def losses(self, name: str, model: ModelSource) -> list[float]:
        """The loss of every row of a task, of its network on some body."""
        import torch

        from mergetool.networks.running import load_network

        asked = self._asked[name]
        return losses(load_network(model, torch.float32, self._running.device, asked.where), asked.examples)

    def _beside(self, task: FineTune, other: FineTune, gradient: ModelSource) -> dict[str, Descent]:
        """By layer, the products of a task's gradient with the task vector of another one."""
        own_of = {body: own for own, body in other.body.items()}
        found: dict[str, Descent] = {}
        for own, body in task.body.items():
            if own in gradient.specs and body in own_of:
                layer = layer_and_role(body)[0]
                found[layer] = found.get(layer, Descent()) + self._products(own, body, other, own_of[body], gradient)
        return found

    def _products(self, name: str, body: str, other: FineTune, own: str, gradient: ModelSource) -> Descent:
        total, size = Descent(), self._base.specs[body].num_elements
        for start in range(0, size, _PIECE):
            stop = min(size, start + _PIECE)
            moved = read(other.source, own, start, stop).double() - read(self._base, body, start, stop).double()
            slope, squares = (read(gradient, f"{before}{name}", start, stop) for before in ("", SQUARED))
            total += descent(moved, slope, squares)
        return total

    # ------------------------------------------------------------------ along a merge

    def along(self, merged: ModelSource, tell: Callable[[str], None]) -> list[Row]:
        """Losses of every task on the base with a merge's change, at several scales."""
        rows = []
        for name, task in self._tasks.items():
            if name not in self._asked:
                continue
            tell(f"looking at the loss of {name} along the merge")
            for scale in SCALES:
                model = OnBody(task, partial(self._moved, merged, scale), lambda _: "F32")
                rows.append({"model": name, "scale": scale, "loss": fmean(self.losses(name, model))})
        return rows

    def _moved(self, merged: ModelSource, scale: float, name: str) -> "Tensor":
        before = self._stored(name).float()
        if name not in merged.specs:
            return before
        return before + scale * (read(merged, name, 0, before.numel()).view_as(before).float() - before)


def path_rows(base: ModelSource, name: str, source: ModelSource, folder: Path) -> list[Row]:
    """How much of a task vector's length and direction each checkpoint of its run has, in the order of the run."""
    task = FineTune.of(name, source, base)
    rows = []
    for place in _checkpoints(folder):
        with closing(open_model(place)) as model:
            there = FineTune.of(place.name, model, base)
            own_of = {body: own for own, body in there.body.items()}
            ab = a2 = b2 = 0.0
            for own, body in task.body.items():
                if body in own_of:
                    end, now = (_change(base, body, each, at) for each, at in ((source, own), (model, own_of[body])))
                    ab, a2, b2 = ab + float(end @ now), a2 + float(end @ end), b2 + float(now @ now)
        rows.append({"model": name, "checkpoint": place.name, "length": ratio(b2, a2), "cosine": cosine(ab, a2, b2)})
    return rows


def _change(base: ModelSource, body: str, source: ModelSource, own: str) -> "Tensor":
    size = base.specs[body].num_elements
    return read(source, own, 0, size).double() - read(base, body, 0, size).double()


def _checkpoints(folder: Path) -> list[Path]:
    """The models in a run's folder, checkpoint-9 before checkpoint-10. Raises SourceError where there is none."""
    found = [path for path in folder.glob("*") if path.is_dir() and any(path.glob("*.safetensors"))]
    if not found:
        fix = "name the folder in which the checkpoints of the run lie, each in a folder of its own"
        raise SourceError("holds no checkpoints", str(folder), fix)
    return sorted(found, key=lambda path: [int(part) if part.isdecimal() else part for part in _parts(path.name)])


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def read(source: ModelSource, name: str, start: int, stop: int) -> "Tensor":
    """Elements [start, stop) of a tensor, flat, as stored."""
    import torch

    dtype = source.specs[name].dtype
    held = torch.empty(stop - start, dtype=torch_dtype(dtype))
    source.read_bytes(name, dtype.num_bytes(start), bytes_of(held))
    return held


def _sum(parts: Mapping[str, Descent]) -> Descent:
    return sum(parts.values(), Descent())


def _angles(found: Descent, ends: list[float] | None = None) -> Row:
    told = {"alignment": found.alignment, "preconditioned": found.preconditioned, "step": found.step}
    return told if ends is None else {**told, "linearity": found.linearity(*ends)}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
