"""Steps after merging (`then:` of a recipe), one file per idea. Being in this folder registers one.

A step is a frozen class like a method: fields with descriptions, documentation, arithmetic. It sees what merging
changed of the base (where there is none, the merged weights) and may change it. What it must know of the models it
takes before they are merged (`look`), since merging overwrites them; what it must know of a whole tensor it counts in a
pass before (`counts`), so that it still sees slices only. `followed` puts methods and steps together.
"""

import pkgutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BaseModel, ConfigDict

from mergetool.methods.base import (
    Factored,
    Field,
    Finite,
    Fraction,
    Granularity,
    Params,
    Positive,
    Schedulable,
    Scheduled,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
    Unit,
    resolve,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "After",
    "Factored",
    "Field",
    "Finite",
    "Fraction",
    "Granularity",
    "Params",
    "Positive",
    "Scheduled",
    "StatisticsPass",
    "Stats",
    "TensorGroup",
    "TensorMethod",
    "Unit",
    "changes",
    "steps",
    "titles",
]

_REGISTRY: dict[str, type["After"]] = {}


class After(BaseModel):
    """Common to all steps. Concrete ones have a field `step` with their name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: Annotated[str, Field(min_length=1, strict=True)] | None = Field(
        None, description="glob on names of output tensors: the others stay as they were merged"
    )
    needs_base: ClassVar[bool] = False
    """Whether only what was changed of a base can be treated so."""
    statistic: ClassVar[str] = ""
    """The statistic of the base that it needs, if any (`mergetool.statistics`)."""
    granularity: ClassVar[Granularity] = "element"
    """What one call must see whole."""
    buffers: ClassVar[int] = 1
    """Temporaries the size of a slice."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        if "step" in cls.model_fields:
            _REGISTRY[cls.step_name()] = cls

    @classmethod
    def step_name(cls) -> str:
        """The name in recipes."""
        return str(cls.model_fields["step"].default)

    @classmethod
    def documentation(cls) -> str:
        """The module docstring: what it does, its reference, and where it differs."""
        return (sys.modules[cls.__module__].__doc__ or cls.__name__).strip()

    @classmethod
    @cache
    def schedulables(cls) -> dict[str, Schedulable]:
        """The numbers that may vary along depth."""
        fields = cls.model_fields.items()
        return {key: mark for key, info in fields for mark in info.metadata if isinstance(mark, Schedulable)}

    def numbers(self, depth: float) -> dict[str, float]:
        """Every number for a tensor at `depth` in [0, 1]; the plan and the lock tell them."""
        return {key: at_depth(getattr(self, key), depth) for key in self.schedulables()}

    @property
    def counts(self) -> bool:
        """Whether it needs a pass over the whole tensor first."""
        return False

    @property
    def scales(self) -> bool:
        """Whether it does nothing but multiply by its number `factor`, which is known before."""
        return False

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        """What one call must see whole of this tensor."""
        return self.granularity

    def look(self, group: TensorGroup, p: Params) -> "Tensor | None":
        """What it must know of a slice of the models (float64), before they are merged. They stay as they are."""
        return None

    def count(self, seen: "Tensor | None", change: "Tensor", group: TensorGroup, p: Params) -> "Tensor":
        """Sums (float64) over a slice: of what it has `seen` of the models, and of the change. Slices add up."""
        raise NotImplementedError

    def apply(self, change: "Tensor", seen: "Tensor | None", group: TensorGroup, p: Params) -> "Tensor":
        """The change as it shall be, in its own buffer or another. `seen`: what was counted of the whole tensor, else
        what it has seen of this slice. Of the `group` only names, shapes, notes and scratch are left."""
        raise NotImplementedError


def changes(group: TensorGroup) -> "Iterator[Tensor]":
    """What every model changed of the base, or its weights where there is none; one by one, the models stay."""
    import torch

    for model in group.models:
        yield model if group.base is None else torch.sub(model, group.base, out=group.scratch("then model"))


def titles(names: Iterable[str]) -> Iterator[str]:
    """What the numbers of steps of these names are called by: its name, and a number where there are several."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name + (f"-{seen[name]}" if seen[name] > 1 else "")


def at_depth(value: object, depth: float) -> float:
    """A number, or a gradient at this depth."""
    found = resolve(value, depth, (), per_model=False)
    assert isinstance(found, float | int)
    return found


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def steps() -> dict[str, type[After]]:
    """Every step by name."""
    _load()
    return dict(sorted(_REGISTRY.items()))
