"""Run the rest of a model when most of it has run already: the parts in between play back what they said.

A classifier of transformers is a large network that experts share, and small parts that are each expert's own. The
network runs once, for samples of all experts. Then every expert's own class runs on its samples, all of its code, with
its own tensors in its own parts; but the largest parts without any such tensors answer from what was recorded. So an
expert reads its network's output exactly as its class does: pooling, activations, padding, whatever the formula.

Recordings belong to the thread that makes them.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.bundle.local import make_local, replaced
from mergetool.errors import SourceError

Said = dict[str, list[Any]]
"""What modules returned, by path, call by call."""


class Recorder:
    """Listens to the parts of a network that experts share."""

    def __init__(self, network: nn.Module, shared: Sequence[str], own: Iterable[str]) -> None:
        """`shared`: the paths of the parts; `own`: names of the network's tensors that are some expert's own."""
        self._local = threading.local()
        self._name = type(network).__name__
        self._seen_apart = False
        self._own: list[tuple[nn.Module, list[str]]] = []
        inside = tuple(f"{path}." for path in shared)
        names = set(own)
        for path, module in network.named_modules():
            if path in shared:
                module.register_forward_hook(lambda *heard, path=path: self._keep(path, heard[-1]))
                if next(module.parameters(), None) is not None:
                    module.register_forward_pre_hook(lambda *_, path=path: self._check_order(path))
            elif module._parameters and not path.startswith(inside):
                module.register_forward_hook(lambda *_, path=path: self._note_own(path))
                if keys := [key for key in module._parameters if f"{path}.{key}".lstrip(".") in names]:
                    make_local(module)
                    self._own.append((module, keys))

    def record(self, run: Callable[[], object]) -> Said:
        """What the parts say while `run` runs, in this thread.

        Raises SourceError where a shared part reads what comes out of an expert's own: shared parts run for several
        experts at once.
        """
        said, mixed = self._listen(run)
        if mixed and not self._seen_apart:  # what is an expert's own ran first: does anything shared depend on it?
            with ExitStack() as stack:
                for module, keys in self._own:
                    spoilt = {key: torch.full_like(module.get_parameter(key), float("nan")) for key in keys}
                    stack.enter_context(replaced(module, spoilt))
                without, _ = self._listen(run)
            if _spoilt(said, without):
                own, path = mixed
                what = f"{path} reads what comes out of {own}, which the base lacks or which is the expert's own"
                raise SourceError(what, self._name, "give the model that the experts were fine-tuned from as base")
            self._seen_apart = True
        return said

    def _listen(self, run: Callable[[], object]) -> tuple[Said, tuple[str, str] | None]:
        heard = self._local.heard = _Heard()
        try:
            run()
        finally:
            self._local.heard = None
        return heard.said, heard.mixed

    def _keep(self, path: str, output: Any) -> None:
        if (heard := self._heard) is not None:
            heard.said.setdefault(path, []).append(output)

    def _note_own(self, path: str) -> None:
        if (heard := self._heard) is not None:
            heard.own = path

    def _check_order(self, path: str) -> None:
        if (heard := self._heard) is not None and heard.own and heard.mixed is None:
            heard.mixed = heard.own, path

    @property
    def _heard(self) -> "_Heard | None":
        return getattr(self._local, "heard", None)


@dataclass
class _Heard:
    """One recording under way."""

    said: Said = field(default_factory=dict)
    own: str | None = None
    """An expert's own part that has run."""
    mixed: tuple[str, str] | None = None
    """One that ran before a shared part, and that part."""


def _spoilt(sound: Any, other: Any) -> bool:
    """Whether another recording holds what is no number where this one does not."""
    if isinstance(sound, Tensor):
        return bool((other.isnan() & ~sound.isnan()).any())
    if isinstance(sound, Mapping):
        return any(_spoilt(sound[key], other[key]) for key in sound)
    if isinstance(sound, tuple | list):
        return any(_spoilt(x, y) for x, y in zip(sound, other, strict=True))
    return False


class Player:
    """What the parts of a model that play back are to say now, in this thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def playing(self, said: Said) -> Iterator[None]:
        self._local.left = {path: iter(outputs) for path, outputs in said.items()}
        try:
            yield
        finally:
            self._local.left = None

    def next(self, path: str) -> Any:
        """The part's next output."""
        try:
            return next(self._local.left[path])
        except (KeyError, StopIteration):
            what = f"runs {path} for one input but not for another"
            raise SourceError(what, "bundle", "report this with the expert's class") from None


class Playback(nn.Module):
    """Stands in for a part: says what was recorded, and looks like the part to those who ask for its attributes."""

    def __init__(self, path: str, player: Player, part: nn.Module) -> None:
        super().__init__()
        self._path = path
        self._player = player
        self._part = (part,)  # no child of this module

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._player.next(self._path)

    def __getattr__(self, name: str) -> Any:
        if name in ("_parameters", "_buffers", "_modules", "_part"):
            raise AttributeError(name)
        return getattr(self._part[0], name)


def shared_parts(model: nn.Module, own: Iterable[str]) -> list[str]:
    """The largest parts of a model that hold tensors, but none of `own` (names of its parameters and buffers)."""
    return list(_shared(model, "", {path for name in own for path in _ancestors(name)}))


def _shared(module: nn.Module, path: str, holders: set[str]) -> Iterator[str]:
    if path in holders or isinstance(module, nn.ModuleList | nn.ModuleDict):
        for name, child in module.named_children():
            yield from _shared(child, f"{path}.{name}".lstrip("."), holders)
    elif next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        yield path


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def set_part(model: nn.Module, path: str, part: nn.Module) -> None:
    """Put another module in the place of one."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = part


def rows_of(value: Any, rows: Sequence[int], num_rows: int) -> Any:
    """Some rows of every tensor with one or several rows a sample, in whatever holds them."""
    if isinstance(value, Tensor):
        if not value.ndim or not len(value) or len(value) % num_rows:
            return value
        return value.reshape(num_rows, -1, *value.shape[1:])[list(rows)].flatten(0, 1)
    if isinstance(value, Mapping):
        chosen = {key: rows_of(part, rows, num_rows) for key, part in value.items()}
        return type(value)(**chosen) if all(isinstance(key, str) for key in chosen) else chosen
    if isinstance(value, tuple | list):
        return type(value)(rows_of(part, rows, num_rows) for part in value)
    return value
