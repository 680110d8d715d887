"""What a step does with its operands: copy one, or merge them by a method.

An operation says what people and the planner ask of it (name, numbers, buffers, what must be seen whole), and tells a
bench which of its few moves to make. How a move is made is the engine's matter.
"""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mergetool.methods.base import Factored, Granularity, Params, StatisticsPass, Stats, TensorMethod
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.methods.group import Note

_CUTTING, _TURNING = 9, 26
"""Whole tensors that taking one apart needs, measured: for a few directions of it, and for all of them."""

_FOLDED = 3
"""The base, the first model, and the one that is looked at."""

_S = TypeVar("_S", contravariant=True)
"""A step, as whoever carries it out knows it."""


class Bench(Protocol[_S]):
    """Who carries out the moves, for elements [start, stop) of a step. What is to be noted goes to `notes`."""

    def copy(self, step: _S, start: int, stop: int, notes: "list[Note]") -> None: ...
    def merge(self, step: _S, start: int, stop: int, notes: "list[Note]", operation: "Merge", stats: Stats) -> None: ...
    def pair(self, step: _S, notes: "list[Note]", operation: "Decompose", stats: Stats) -> None: ...
    def stored(self, step: _S, start: int, stop: int) -> "Tensor": ...
    def merged(
        self, step: _S, start: int, stop: int, notes: "list[Note]", operation: "Merge", stats: Stats
    ) -> "Tensor": ...


class Operation(ABC):
    """How the slots of a step come from its operands."""

    name: str
    """What people call it."""
    method: TensorMethod | None
    """Whose arithmetic it is."""
    models: tuple[str, ...]
    """Names of the models that are merged, in the order of the step's operands (a base may stand in for one)."""
    counts: StatisticsPass | None
    """The pass over the operands that comes first."""
    counts_model: bool = False
    """Whether that pass counts over the whole model, together with the other steps of which this is so."""
    counts_again: bool = False
    """Whether more is counted over each tensor by itself once that is known (`pass_after`)."""
    buffers: int = 0
    """Temporaries the size of a slice."""
    arithmetic: bool = False
    """Whether values of several operands meet."""
    needs_float64: bool = False
    bytes_read: int | None = None
    """What it reads of its operands, where that is not all of them."""
    bytes_held: int | None = None
    """What it holds, where that is no number of whole tensors."""
    flops: float | None = None
    """Multiply-adds, where they are not those of decomposing every operand."""
    folds: bool = False
    """Whether it needs its operands one after the other only."""
    recalls: bool = False
    """Whether what a pass keeps can be all that it needs of its operands, but for the base."""
    keeps: bool = True
    """Whether what its passes keep on the way is there for what comes next."""
    transposed: bool = False
    """Whether factors are those of the tensor turned, which is stored as (inputs, outputs)."""

    @property
    def numbers(self) -> Mapping[str, Any]:
        """The numbers that it goes by here."""
        return {}

    @property
    def told(self) -> Mapping[str, Any]:
        """The same for people, where there are several."""
        return self.numbers

    @property
    def sliced(self) -> "Operation":
        """What is done slice by slice: itself, or a part that the rest waits for."""
        return self

    def granularity(self, spec: TensorSpec) -> Granularity:
        """What of a tensor it must see whole."""
        return "element"

    def way(self, spec: TensorSpec) -> Factored:
        """How it is done to products of two factors."""
        return "product"

    def coefficients(self) -> tuple[float, ...]:
        """Where these are summed up: the factor of every model's."""
        raise TypeError(f"{self.name} is no sum")

    def streams(self, reads: int) -> int:
        """How many of so many operands are there at once."""
        return min(reads, _FOLDED) if self.folds else reads

    def copies(self, reads: int) -> int:
        """Whole tensors held at once, where it must see them whole, of so many operands."""
        return self.streams(reads) + self.buffers + 1

    def treatment(self, spec: TensorSpec) -> str:
        """What is done to a tensor, in a word."""
        return self.name

    def partners(self, name: str) -> tuple[str, ...]:
        """Other output tensors whose operands are looked at for the tensor of this name."""
        return ()

    def counting(self, spec: TensorSpec, num_elements: int, bits: int) -> "Operation":
        """With the pass that it needs for a tensor over so many elements, at this width of the compute dtype."""
        return self

    def pass_after(self, found: Stats) -> StatisticsPass | None:
        """The first pass over the step by itself, after what is counted over the whole model."""
        return None

    def perform(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> None:
        """Make elements [start, stop) of the step."""
        raise TypeError(f"{self.name}: models are taken apart as a whole, not slice by slice")

    def values(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> "Tensor":
        """Elements [start, stop) as they are before they are stored."""
        raise TypeError(f"{self.name} makes no tensor by itself")


class _Plain(Operation):
    """No method has a part in it."""

    method = None
    counts = None


@dataclass(frozen=True)
class Copy(_Plain):
    """The only operand as it is, or cast where another storage dtype is asked for."""

    name = "copy"
    models = ()

    def way(self, spec: TensorSpec) -> Factored:
        return "sum"

    def coefficients(self) -> tuple[float, ...]:
        return (1.0,)

    def perform(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> None:
        bench.copy(step, start, stop, notes)

    def values(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> "Tensor":
        return bench.stored(step, start, stop)


@dataclass(frozen=True)
class Factorise(_Plain):
    """Leading singular vectors of every model's task vector, or the task vectors in full (`rank` 0)."""

    models: tuple[str, ...]
    rank: int
    changed: int | None = None
    """How many directions adapters changed at most, where that is known and no weight is read."""
    arithmetic = True
    buffers = 16

    @property
    def name(self) -> str:  # type: ignore[override]
        return "unchanged" if self.changed == 0 else "factors" if self.rank else "in full"

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {"rank": self.rank} if self.rank else {}

    def granularity(self, spec: TensorSpec) -> Granularity:
        by_itself = self.changed == 0 or (self.changed is not None and self.rank > 0)
        return "element" if by_itself else "tensor"


@dataclass(frozen=True)
class Merged(Factorise):
    """What a bundle has of a tensor in its base alone: the merge of all models."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "merged"


@dataclass(frozen=True)
class Mask(Factorise):
    """Masks of one change that all models share; `rank`: directions that a router reads beside them."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "unchanged" if self.changed == 0 else "masks"

    def granularity(self, spec: TensorSpec) -> Granularity:
        return "element" if self.changed == 0 else "tensor"


@dataclass(frozen=True)
class Decompose(Operation):
    """What another operation changes of the base, as the product of two matrices: B (m, r) and A (r, n)."""

    inner: Operation
    keep: int | float | None
    """At most so many directions, or as many as hold this share of the energy, or all."""
    most: int
    """Directions that there is room for."""
    transposed: bool = False
    whole: bool = False
    """Whether the other operation sees whole tensors."""
    factored: bool = False
    """Whether all models are the base and factors, so that no tensor of the full size is needed."""
    bytes_read: int | None = None
    bytes_held: int | None = None
    flops: float | None = None
    experts: int = 1
    """Matrices that lie one behind the other in the tensor: the experts of a layer."""
    times: int = 1
    """How often PEFT adds the product."""
    arithmetic = True
    needs_float64 = True

    @property
    def sliced(self) -> Operation:
        return self.inner

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def method(self) -> TensorMethod | None:  # type: ignore[override]
        return self.inner.method

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.models

    @property
    def counts(self) -> StatisticsPass | None:  # type: ignore[override]
        return None if self.factored and not self.inner.counts_model else self.inner.counts

    @property
    def counts_model(self) -> bool:  # type: ignore[override]
        return self.inner.counts_model

    @property
    def counts_again(self) -> bool:  # type: ignore[override]
        return self.inner.counts_again and not self.factored

    def pass_after(self, found: Stats) -> StatisticsPass | None:
        return None if self.factored else self.inner.pass_after(found)

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {**self.inner.numbers, "rank": self.keep if isinstance(self.keep, float) else self.most}

    def granularity(self, spec: TensorSpec) -> Granularity:
        return "tensor"

    def copies(self, reads: int) -> int:
        if self.factored:
            return 0
        own = _CUTTING if isinstance(self.keep, int) else _TURNING
        return own + (self.inner.copies(reads) if self.whole else 0)

    def treatment(self, spec: TensorSpec) -> str:
        return f"{self.inner.treatment(spec)}, as factors"

    def partners(self, name: str) -> tuple[str, ...]:
        return self.inner.partners(name)

    def counting(self, spec: TensorSpec, num_elements: int, bits: int) -> Operation:
        return replace(self, inner=self.inner.counting(spec, num_elements, bits))

    def perform(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> None:
        bench.pair(step, notes, self, stats)


@dataclass(frozen=True)
class Merge(Operation):
    """A method with its numbers at this depth."""

    method: TensorMethod
    params: Params
    models: tuple[str, ...]
    counts: StatisticsPass | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.called

    @property
    def arithmetic(self) -> bool:  # type: ignore[override]
        return self.method.mixes

    @property
    def buffers(self) -> int:  # type: ignore[override]
        return self.method.buffers

    @property
    def folds(self) -> bool:  # type: ignore[override]
        return self.method.folds

    @property
    def recalls(self) -> bool:  # type: ignore[override]
        return self.method.recalls

    @property
    def counts_model(self) -> bool:  # type: ignore[override]
        return self.counts is not None and self.method.pass_scope() == "model"

    @property
    def counts_again(self) -> bool:  # type: ignore[override]
        return self.method.pass_after({}) is not None

    def pass_after(self, found: Stats) -> StatisticsPass | None:
        return self.method.pass_after(found)

    @property
    def needs_float64(self) -> bool:  # type: ignore[override]
        return self.method.needs_float64

    @property
    def numbers(self) -> Mapping[str, Any]:
        return vars(self.params)

    def granularity(self, spec: TensorSpec) -> Granularity:
        return self.method.granularity_in(spec.name, spec.shape)

    def way(self, spec: TensorSpec) -> Factored:
        return self.method.in_factors(spec.name, spec.shape)

    def coefficients(self) -> tuple[float, ...]:
        return self.method.coefficients(self.params)

    def treatment(self, spec: TensorSpec) -> str:
        return self.method.treatment(spec.name, spec.shape)

    def partners(self, name: str) -> tuple[str, ...]:
        return self.method.partners(name)

    @property
    def pass_settings(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """All that decides what its passes find, but for the weights: settings and numbers."""
        depends = self.method.pass_depends_on
        names = self.numbers.keys() if depends is None else depends
        return self.method.settings_of_passes(), {name: self.numbers[name] for name in names}

    def counting(self, spec: TensorSpec, num_elements: int, bits: int) -> Operation:
        counts = self.method.counts(spec.name, spec.shape)
        return replace(self, counts=self.method.statistics_pass(self.params, num_elements, bits) if counts else None)

    def perform(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> None:
        bench.merge(step, start, stop, notes, self, stats)

    def values(self, bench: Bench[_S], step: _S, start: int, stop: int, notes: "list[Note]", stats: Stats) -> "Tensor":
        return bench.merged(step, start, stop, notes, self, stats)
