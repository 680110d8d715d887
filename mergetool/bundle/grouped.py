"""One forward pass of a real model in which every sample has the weights of its own group of tasks.

The samples of a batch are sorted by group, so a group is a run of rows. Each module whose parameters any expert
changed gets another `forward` for the time being:

linear      x W0^T and ((x V) S) U^T on top, run by run; or, for groups that have seen enough rows for it to pay, x W^T
            with the group's own weights
embedding   rows of W0, and rows of U S times V^T on top
norm        run by run with the group's own weight and bias
conv        run by run with the group's own weights
others      (class tokens, tables of positions) one value per sample, where the model adds them up by broadcasting

Where that is not possible (weights that all samples share by construction, experts of a mixture, modules of unknown
kind) a batch is cut into groups, and each passes through the model alone. Weights are never made per sample.

Several threads may do this at once: what a pass is about (its runs, other weights in the place of a module's own)
belongs to the thread that it is in, and in a thread that makes no such pass the model is what it was.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (as everybody calls it)

from mergetool.bundle.arrow import Mix
from mergetool.bundle.factors import Group, TaskFactors
from mergetool.bundle.local import make_local, own_tensor, pending, replaced
from mergetool.errors import PlanError, SourceError
from mergetool.networks.places import Fragment
from mergetool.networks.spread import fetched, forward_key

NOTHING: Mapping[str, tuple[Fragment, ...]] = MappingProxyType({})
_SHARED = ("relative_attention_bias",)
"""Modules whose output all samples of a batch share."""


@dataclass(frozen=True)
class Runs:
    """The groups of a sorted batch: group i has samples [bounds[i], bounds[i + 1])."""

    groups: tuple[Group, ...]
    bounds: tuple[int, ...]
    mix: Mix | None = None
    """The shares of all experts in linear layers, where there is one group, that of all tasks."""

    @classmethod
    def mixed(cls, mix: Mix, num_samples: int) -> "Runs":
        """All samples together, with shares of all experts."""
        return cls((tuple(range(len(mix.mixer.factors.manifest.tasks))),), (0, num_samples), mix)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Runs":
        """The runs of samples whose groups these are, in order, equal ones side by side."""
        starts = [place for place, group in enumerate(groups) if place == 0 or groups[place - 1] != group]
        return cls(tuple(groups[start] for start in starts), (*starts, len(groups)))

    @property
    def num_samples(self) -> int:
        return self.bounds[-1]

    def slices(self, num_rows: int) -> Iterator[tuple[Group, slice]]:
        """Every group with its run of rows, where `num_rows` is a multiple of the number of samples."""
        if len(self.groups) == 1:
            yield self.groups[0], slice(0, num_rows)
            return
        per_sample, rest = divmod(num_rows, self.num_samples)
        assert rest == 0, f"{num_rows} rows for {self.num_samples} samples"
        for group, start, stop in zip(self.groups, self.bounds, self.bounds[1:], strict=False):
            yield group, slice(start * per_sample, stop * per_sample)

    def spread(self, values: Sequence[Tensor], like: Tensor) -> Tensor:
        """One value (D,) per group as one per row of `like` (rows, ..., D), shaped to broadcast; or the only one."""
        if len(self.groups) == 1:
            return values[0]
        runs = [run.stop - run.start for _, run in self.slices(like.shape[0])]
        counts = torch.tensor(runs, device=like.device)
        rows = torch.stack(list(values)).repeat_interleave(counts, 0)
        return rows.view(len(rows), *[1] * (like.ndim - 2), -1)


class SeveralGroups(Exception):  # noqa: N818  (no error: the groups are run one by one then)
    """A module reads another one's tensor, which has other values for every group of the batch."""


class GroupedModel:
    """A model, the factors of its experts, and the way every changed parameter is used."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        factors: TaskFactors,
        fragments: Mapping[str, tuple[Fragment, ...]] = NOTHING,
        held: Collection[str] | None = None,
    ) -> None:
        """`names`: what the model's parameters are called in the checkpoint; `fragments`: what others are made of.

        Raises SourceError where a changed tensor of the checkpoint (or of `held`, the part that it has) is not found.
        """
        self.factors = factors
        self._model = model
        parameters = factors.manifest.parameters
        changed = {name for name, parameter in parameters.items() if parameter.policy != "skip"}
        changed &= changed if held is None else set(held)
        self._places = _places(model, _named(model, names, fragments, factors, changed), factors)
        self.mixable = all(place.mixable for place in self._places)
        self._passes = _Passes()
        self._before: list[tuple[nn.Module, str, Any]] = []
        for place in self._places:
            make_local(place.module, partial(self._offered, place) if place.forward is not None else None)
            if place.turned:
                place.module.register_forward_hook(partial(self._mixed, place))

    @contextmanager
    def using(self, runs: Runs) -> Iterator[None]:
        """While inside, the model has each group's weights for its run of samples, in this thread."""
        assert len(runs.groups) == 1 or self.mixable
        with ExitStack() as stack:
            stack.enter_context(self._passes.one(runs, self._install, self._remove))
            for place in self._places:
                if place.forward is None:
                    stack.enter_context(replaced(place.module, place.whole(runs, self.factors)))
            yield
        self.factors.end_pass()

    def _offered(self, place: "_Place", key: str) -> Tensor | None:
        """What a module finds that reads another one's tensor instead of calling it: that of the one group there is."""
        runs = self._passes.current
        if runs is None or key not in place.names:
            return None
        return pending(_get(place.module, key), partial(place.of_one_group, key, runs, self.factors))

    def _mixed(self, place: "_Place", _: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor | None:
        """What a layer that stores its weight as (inputs, outputs) makes with all experts' shares."""
        runs = self._passes.current
        if runs is None or runs.mix is None:
            return None
        bias = place.names.get("bias") if runs.mix.of_biases else None
        return output + runs.mix.change(arguments[0], place.names["weight"], turned=True, bias=bias)

    def _install(self) -> None:
        """Raises PlanError where modules were replaced: what experts changed of those would be left out unseen."""
        present = {id(module) for module in self._model.modules()}
        if gone := next((place for place in self._places if id(place.module) not in present), None):
            what = f"the module of {next(iter(gone.names.values()))} was replaced (quantised, or wrapped) after opening"
            fix = "open it again, and do so with one expert: mergetool bundle dense BUNDLE NAME -o NAME"
            raise PlanError(what, type(self._model).__name__, fix)
        for place in self._places:
            if place.forward is not None:
                key = forward_key(place.module)
                self._before.append((place.module, key, vars(place.module).get(key)))
                setattr(place.module, key, partial(self._run, place))

    def _remove(self) -> None:
        for module, key, before in self._before:
            delattr(module, key) if before is None else setattr(module, key, before)
        self._before.clear()

    def _run(self, place: "_Place", *args: Any, **kwargs: Any) -> Any:
        runs = self._passes.current
        if runs is None or place.forward is None:  # another thread's pass: this one runs the model as it is
            return type(place.module).forward(place.module, *args, **kwargs)
        return place.forward(place, runs, self.factors, *args, **kwargs)


class _Passes:
    """The passes under way: the runs of each thread's own, and how many threads are in one."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._num_threads = 0

    @property
    def current(self) -> Runs | None:
        """The runs of the pass that this thread is in."""
        return getattr(self._local, "runs", None)

    @contextmanager
    def one(self, runs: Runs, install: Callable[[], None], remove: Callable[[], None]) -> Iterator[None]:
        """A pass of this thread; `install` before the first of all that overlap, `remove` after the last."""
        before = self.current
        with self._lock:
            if self._num_threads == 0:
                install()
            self._num_threads += 1
        self._local.runs = runs
        try:
            yield
        finally:
            self._local.runs = before
            with self._lock:
                self._num_threads -= 1
                if self._num_threads == 0:
                    remove()


@dataclass(frozen=True)
class _Place:
    """A module with changed parameters: names in the checkpoint by name in the module."""

    module: nn.Module
    names: dict[str, str]
    forward: "Callable[[_Place, Runs, TaskFactors, Any], Tensor] | None"
    """How it runs for several groups; None: its parameters are replaced for the whole pass."""
    mixable: bool
    turned: bool = False
    """Whether it is a linear layer that stores its weight as (inputs, outputs), kept as factors."""

    def whole(self, runs: Runs, factors: TaskFactors) -> dict[str, Tensor]:
        """All changed parameters, by their names in the module."""
        left = set()
        if self.turned and runs.mix is not None:
            left = {"weight", "bias"} if runs.mix.of_biases else {"weight"}
        return {key: self._whole(key, runs, factors) for key in self.names.keys() - left}

    def of_one_group(self, key: str, runs: Runs, factors: TaskFactors) -> Tensor:
        """A whole parameter of the only group. Raises SeveralGroups where there are others."""
        if len(runs.groups) > 1:
            raise SeveralGroups
        original = _get(self.module, key)
        return original + factors.dense_change(runs.groups[0], self.names[key]).to(original)

    def _whole(self, key: str, runs: Runs, factors: TaskFactors) -> Tensor:
        """A parameter of its group, or one per sample along a first axis of size 1."""
        original = _get(self.module, key)
        values = [original + factors.dense_change(group, self.names[key]).to(original) for group in runs.groups]
        if len(values) == 1:
            return values[0]
        counts = torch.tensor([b - a for a, b in zip(runs.bounds, runs.bounds[1:], strict=False)])
        return torch.cat(values).repeat_interleave(counts.to(original.device), 0)

    def value(self, key: str, group: Group, factors: TaskFactors) -> Tensor | None:
        """A vector of the group (the model's own where no expert changed it), or None where the module has none."""
        original = own_tensor(self.module, key)
        if original is None or key not in self.names:
            return original
        return original + factors.vector(group, self.names[key]).to(original)


def _get(module: nn.Module, key: str) -> Tensor:
    """A parameter or buffer that is there."""
    tensor = own_tensor(module, key)
    assert tensor is not None, key
    return fetched(module, key, tensor)


def _named(
    model: nn.Module,
    stored: Mapping[str, str],
    fragments: Mapping[str, tuple[Fragment, ...]],
    factors: TaskFactors,
    changed: set[str],
) -> dict[int, str]:
    """Names of the changed tensors of a model, by identity. Raises SourceError where one of them is not there."""
    named, met = dict[int, str](), set[str]()
    for name, tensor in _tensors(model):
        if stored.get(name) in changed:
            named[id(tensor)] = stored[name]
            met.add(stored[name])
        elif made_of := {fragment.name for fragment in fragments.get(name, ())} & changed:
            named[id(tensor)] = f"{type(model).__name__}: {name}"
            factors.compose(named[id(tensor)], tuple(tensor.shape), fragments[name])
            met |= made_of
    if missing := changed - met:
        what = f"the model has no parameter for {len(missing)} changed tensors, first {min(missing)!r}"
        raise SourceError(what, type(model).__name__, "use the transformers version that the base was saved with")
    return named


def _places(model: nn.Module, named: Mapping[int, str], factors: TaskFactors) -> list[_Place]:
    """Every module that holds a changed parameter, and how it can be run."""
    places = []
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        names = {key: named[id(value)] for key, value in own.items() if id(value) in named}
        if names:
            places.append(_place(path, module, names, factors))
    return places


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _place(path: str, module: nn.Module, names: dict[str, str], factors: TaskFactors) -> _Place:
    shared = path.rpartition(".")[2] in _SHARED
    spectral = {key for key, name in names.items() if factors.policy(name) == "svd"}
    if type(module) is nn.Linear:
        return _Place(module, names, _linear, mixable=True)
    if type(module) is nn.Embedding and not shared:
        return _Place(module, names, _embedding, mixable=True)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _Place(module, names, _run_by_run, mixable=True)
    if type(module) is nn.LayerNorm:
        return _Place(module, names, _layer_norm, mixable=True)
    if type(module).__name__.endswith("Norm") and set(names) == {"weight"} and module.weight.ndim == 1 and not spectral:
        return _Place(module, names, _scaled_norm, mixable=True)
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layers
        return _Place(module, names, None, mixable=False, turned="weight" in spectral)
    leaf = [_get(module, key) for key in names]
    per_sample = not shared and all(value.ndim > 1 and value.shape[0] == 1 for value in leaf)
    return _Place(module, names, None, mixable=per_sample)


# ---------------------------------------------------------------- the ways to run a module


def _linear(place: _Place, runs: Runs, factors: TaskFactors, x: Tensor) -> Tensor:
    module = place.module
    weight, name = _get(module, "weight"), place.names.get("weight")
    runs_of_rows = list(runs.slices(x.shape[0]))
    biases = [place.value("bias", group, factors) for group, _ in runs_of_rows]
    if name is None or factors.policy(name) == "full":
        outputs = [
            F.linear(x[run], _full(weight, name, group, factors), bias)
            for (group, run), bias in zip(runs_of_rows, biases, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if runs.mix is not None:
        own = place.names.get("bias") if runs.mix.of_biases else None
        bias = biases[0] if own is None else own_tensor(module, "bias")
        return F.linear(x, weight, bias) + runs.mix.change(x, name, turned=False, bias=own)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for (group, run), bias in zip(runs_of_rows, biases, strict=True):
        out[run] = _low_rank(x[run], weight, bias, group, name, factors)
    return out


def _full(weight: Tensor, name: str | None, group: Group, factors: TaskFactors) -> Tensor:
    return weight if name is None else weight + factors.vector(group, name).to(weight)


def _low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, name: str, factors: TaskFactors) -> Tensor:
    """x (W0 + us vh)^T + bias for one group, through the factors or, once that pays, through the dense matrix."""
    matrix = factors.matrix(group, name)
    matrix.num_rows_seen += x[..., 0].numel()
    if matrix.num_rows_seen > matrix.worthwhile:
        return F.linear(x, factors.dense(group, matrix, weight), bias)
    return F.linear(x, weight, bias) + (x @ matrix.vh.mT) @ matrix.us.mT


def _embedding(place: _Place, runs: Runs, factors: TaskFactors, ids: Tensor) -> Tensor:
    module, name = place.module, place.names["weight"]
    assert isinstance(module, nn.Embedding)
    if len(runs.groups) > 1 and ids.shape[0] == 1:  # positions, which all samples share
        ids = ids.expand(runs.num_samples, *ids.shape[1:])
    rows = F.embedding(ids, _get(module, "weight"), module.padding_idx)
    changes = [_rows(group, name, ids[run], factors) for group, run in runs.slices(ids.shape[0])]
    return rows + (changes[0] if len(changes) == 1 else torch.cat(changes)).to(rows.dtype)


def _rows(group: Group, name: str, ids: Tensor, factors: TaskFactors) -> Tensor:
    if factors.policy(name) == "full":
        return F.embedding(ids, factors.vector(group, name))
    matrix = factors.matrix(group, name)
    return F.embedding(ids, matrix.us) @ matrix.vh


def _layer_norm(place: _Place, runs: Runs, factors: TaskFactors, x: Tensor) -> Tensor:
    module = place.module
    assert isinstance(module, nn.LayerNorm)
    if len(runs.groups) > 1 and x.shape[0] == 1:  # what all samples share
        x = x.expand(runs.num_samples, *x.shape[1:])
    outputs = []
    for group, run in runs.slices(x.shape[0]):
        weight, bias = (place.value(key, group, factors) for key in ("weight", "bias"))
        outputs.append(F.layer_norm(x[run], module.normalized_shape, weight, bias, module.eps))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _scaled_norm(place: _Place, runs: Runs, factors: TaskFactors, x: Tensor) -> Tensor:
    """Norms of any formula that multiply by their weight: run as they are, with one weight per sample."""
    weights = [place.value("weight", group, factors) for group in runs.groups]
    spread = runs.spread([weight for weight in weights if weight is not None], x)
    with replaced(place.module, {"weight": spread}):
        out: Tensor = type(place.module).forward(place.module, x)
    return out


def _run_by_run(place: _Place, runs: Runs, factors: TaskFactors, x: Tensor) -> Tensor:
    outputs = []
    for group, run in runs.slices(x.shape[0]):
        values = {
            key: _get(place.module, key) + factors.dense_change(group, name).to(_get(place.module, key))
            for key, name in place.names.items()
        }
        with replaced(place.module, values):
            outputs.append(type(place.module).forward(place.module, x[run]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
