"""One tensor of every model as a merging method sees it: values, numbers, and passes that count over it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergetool.bundle.store import FactorStore

Note = str | tuple[str, float]
"""A remark about a tensor, or a number that was measured on it, by what it is."""

Granularity = Literal["element", "row", "tensor"]
"""What must not be torn apart: nothing, rows, or the whole tensor."""

Factored = Literal["sum", "cores", "outputs", "inputs", "product", "halves"]
"""How products of thin matrices, the changes that adapters make, are merged (`families.low_rank`).

sum: as a combination with known `coefficients`. cores: in bases of what all of them write and read. outputs, inputs: in
a basis of what they write, or of what they read; the other side stays as it is. product: entry by entry, or row by row.
halves: the thin matrices by themselves, whatever their product.
"""

Stats = Mapping[str, tuple[float, ...]]
"""What passes found out about one tensor (or the whole model): small, exact, and savable as JSON."""


class Measurements(Protocol):
    """What was measured on the models of a group, for the tensor at hand."""

    @property
    def turned(self) -> bool:
        """Whether the tensor is stored as (inputs, outputs)."""
        ...

    def of(self, place: int) -> "Tensor":
        """The statistic of one model, in compute dtype: of this slice where it has the tensor's shape, else all of it.

        It belongs to the call until the next one is asked for.
        """
        ...

    def size(self, place: int) -> float:
        """The root mean square of a model's whole statistic."""
        ...

    def of_base(self) -> "Tensor | None":
        """The whole statistic of the base that a step after merging needs, if there is one of this tensor."""
        ...


class Shelf(Protocol):
    """Where a pass over the whole model may leave a merged tensor for the merge that follows: a cache."""

    def put(self, tensor: "Tensor", notes: "Sequence[Note]") -> None:
        """Keep a tensor, and what is to be noted about it, if there is room."""
        ...

    def take(self) -> "tuple[Tensor, Sequence[Note]] | None":
        """What was put there; None where nothing was, or it was taken."""
        ...


@dataclass
class TensorGroup:
    """One tensor (or a slice of it) of every model, in compute dtype, as a method sees it.

    `base` and each of `models` have the same shape: 1-D slices for granularity "element", (rows, ...)
    for "row", the whole tensor for "tensor". They belong to the call: a method may overwrite them through `deltas`.
    """

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    names: tuple[str, ...]
    """Names of the models, in the order of `models`."""
    base: "Tensor | None"
    models: "list[Tensor]"
    start: int = 0
    """Flat index, in the whole tensor, of the first element here."""
    seed: int = 0
    """The run's seed; with the tensor's name, a model's name and a flat index it keys every random draw."""
    new: "Callable[[str, torch.dtype], Tensor] | None" = None
    """Where temporaries come from: (name, dtype) -> uninitialised tensor like `models[0]`, reused between calls."""
    other: "Callable[[str], TensorGroup | None] | None" = None
    """Another whole tensor of the same models, if it is merged in the same way and reads as many inputs."""
    store: "FactorStore | None" = None
    """Where factors of task vectors are kept between runs, if anywhere."""
    measured: Measurements | None = None
    """The statistics that the method and the steps after it need; None where they need none, or there is none."""
    notes: list[Note] = field(default_factory=list)
    shelf: Shelf | None = None
    """Of this tensor, where passes count over the whole model."""
    kept: "dict[object, Tensor] | None" = None
    """What was found on the way over this very slice and is dear to find again; None where passes and merges are done
    by whoever is free. It must be small, or lie in `room`, and nobody may count on it."""
    room: "Callable[[], Tensor | None] | None" = None
    """Room for one more slice in the compute dtype that may be kept, if there is any."""

    def measure(self, what: str, value: float) -> None:
        """Record a number about this tensor; it goes into the lock, and its mean into the summary of the run."""
        if math.isfinite(value):
            self._add((what, float(f"{value:.6g}")))
        else:
            self._add(f"{what} is not finite")

    def note(self, text: str) -> None:
        """Record a remark about this tensor; it goes into the lock and the summary of the run."""
        self._add(text)

    def _add(self, note: Note) -> None:
        if note not in self.notes:
            self.notes.append(note)

    @cached_property
    def deltas(self) -> "list[Tensor]":
        """Task vectors (model - base). Overwrites `models`, whose buffers it uses."""
        import torch

        assert self.base is not None, f"{self.name}: this method was planned without a base"
        return [torch.sub(model, self.base, out=model) for model in self.models]

    def scratch(self, name: str, dtype: "torch.dtype | None" = None) -> "Tensor":
        """An uninitialised tensor shaped like one model's slice; the same memory for the same name every time."""
        import torch

        like = self.models[0]
        if self.new is None:
            return torch.empty_like(like, dtype=dtype or like.dtype)
        return self.new(name, dtype or like.dtype)


class Params(SimpleNamespace):
    """A method's numbers for one tensor: floats, and tuples (one per model of the group) for per-model fields.

    Names that mean the same in every method have a type; those of single methods are what its fields say.
    """

    weight: tuple[float, ...]
    gamma: tuple[float, ...]
    scale: float
    t: float
    noise: float
    r: float
    alpha: float

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the numbers of a tensor stay as they are: {name} cannot be set")


class StatisticsPass(Protocol):
    """One reading pass that only counts. Partial counts of slices add up; `conclude` says what to do next."""

    one_in: int = 1
    """The share of the elements that the pass looks at: all, or a sample of one in so many, in runs."""
    joined: bool = False
    """Whether partial counts, rows of tables then, are put one below the other in file order, not added up."""

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        """Counts (int64) or sums (float64), on the CPU, of the slices of one unit of work, which come one by one.

        Those of all units are added up, sums of floats in a fixed order. The shape does not depend on the slices.
        """
        ...

    def conclude(self, total: "Tensor") -> "StatisticsPass | Stats":
        """From the summed counts: the next pass, or the finished statistics."""
        ...
