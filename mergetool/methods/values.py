"""Numbers as people write them in a recipe, and what they come to for one tensor.

    density: 0.2                              the same everywhere
    density: {gradient: [0.5, 0.1]}           along depth: linear between equally spaced knots, first to last layer
    density: {math: 0.2, code: 0.4}           per model (every model must be named); values may be gradients
    scale: recover                            counted from the models (`Scale` only)

`Scheduled[T]` takes the first two forms, `PerModel[T]` all three. `T` carries the bounds (`Fraction`, `Finite`, ...),
so that they hold for every knot and every model. `resolve` turns any of them into plain floats.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

T = TypeVar("T")

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""Any finite number."""
Fraction = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]
"""A share in (0, 1]."""
Unit = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
"""A share in [0, 1]."""
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
"""A finite number that is not negative."""


def _form(value: object) -> str:
    """Which form of a rank a value is meant to have, so that an error is about that one only."""
    if isinstance(value, dict):
        return "by energy"
    return "share" if isinstance(value, float) else "count" if type(value) is int else "word"


Rank = Annotated[
    Annotated[Literal["auto"], Tag("word")]
    | Annotated[int, Field(strict=True, ge=1), Tag("count")]
    | Annotated[Fraction, Tag("share")]
    | Annotated[dict[Literal["energy"], Fraction], Field(min_length=1), Tag("by energy")],
    Discriminator(_form),
]
"""How many directions are kept of a task vector; `mergetool.kernels.spectral` says what each form comes to."""
RANK = (
    "directions kept of each task vector: auto (smaller dimension // number of models), a number, "
    "a share of the smaller dimension, or {energy: share of the squared norm}"
)
"""The description of every field of this type."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Gradient(Generic[T]):
    """Knots along depth: equally spaced from the first layer to the last, linear in between."""

    gradient: tuple[T, ...] = Field(min_length=2, description="values from the first layer to the last")


@dataclass(frozen=True)
class Schedulable:
    """Marks a field as a number that may vary by tensor; `per_model` ones also by model."""

    per_model: bool
    counted: bool = False
    """Whether it may be left to be counted."""


def _kind(value: Any) -> str:
    if isinstance(value, Gradient) or (isinstance(value, dict) and "gradient" in value):
        return "(gradient)"
    return "(per model)" if isinstance(value, dict) else "(number)"


_Number = Annotated[T, Tag("(number)")]
_Gradient = Annotated[Gradient[T], Tag("(gradient)")]
Scheduled = Annotated[_Number[T] | _Gradient[T], Discriminator(_kind), Schedulable(per_model=False)]
_Plain = Annotated[_Number[T] | _Gradient[T], Discriminator(_kind)]
_Mapping = Annotated[dict[str, _Plain[T]], Tag("(per model)")]
PerModel = Annotated[_Number[T] | _Gradient[T] | _Mapping[T], Discriminator(_kind), Schedulable(per_model=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recover:
    """A scale that is counted: what gives the task vectors their length back on average, in the merge."""

    recover: Literal["model", "tensor"] = Field(description="over all matrices together, or each by itself")
    cap: Annotated[Finite, Field(gt=0)] = Field(default=3.0, description="at most so much")

    def __str__(self) -> str:
        return f"recover {self.recover}, at most {self.cap:g}"


RECOVER: Literal["recover"] = "recover"
"""The short way to write one."""


def asks_to_recover(value: object) -> bool:
    """Whether a scale is one to be counted, as it is written or as it was read."""
    return value == RECOVER or isinstance(value, Recover) or (isinstance(value, dict) and "recover" in value)


def _kind_of_scale(value: Any) -> str:
    if not asks_to_recover(value):
        return _kind(value)
    return "(word)" if isinstance(value, str) else "(recover)"


Scale = Annotated[
    _Number[Finite]
    | _Gradient[Finite]
    | Annotated[Literal["recover"], Tag("(word)")]
    | Annotated[Recover, Tag("(recover)")],
    Discriminator(_kind_of_scale),
    Schedulable(per_model=False, counted=True),
]
"""A factor on a merged task vector, which may be left to be counted."""


def at_depth(value: "float | Gradient[float]", depth: float) -> float:
    """The number at `depth` in [0, 1]: linear between the two neighbouring knots of a gradient."""
    if not isinstance(value, Gradient):
        return value
    knots = value.gradient
    place = depth * (len(knots) - 1)
    left = min(int(place), len(knots) - 2)
    share = place - left
    return (1.0 - share) * knots[left] + share * knots[left + 1]


def settled(value: Any, depth: float) -> Any:
    """A field's value with every gradient in it replaced by its number at `depth`."""
    if isinstance(value, dict):
        return {name: settled(each, depth) for name, each in value.items()}
    return at_depth(value, depth)


def resolve(value: Any, depth: float, models: Sequence[str], *, per_model: bool) -> float | tuple[float, ...]:
    """A field's value for one tensor: a float, or for per-model fields a tuple in the order of `models`."""
    if not per_model:
        return at_depth(value, depth)
    if isinstance(value, dict):
        return tuple(at_depth(value[name], depth) for name in models)
    return (at_depth(value, depth),) * len(models)


def cancel(weights: Sequence[float]) -> bool:
    """Whether weights add up to 0, but for rounding (0.1 + 0.2 - 0.3 is 5.6e-17)."""
    return abs(sum(weights)) <= 1e-12 * sum(map(abs, weights))
