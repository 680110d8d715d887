"""What a layout is: from the headers of the models to the output's tensors, and where each of them comes from.

A layout lives in one file of this folder and registers itself by being there. Its fields are sections of a recipe
(`slices`, `outside`); the recipe checker validates them, and planning asks for the arrangement. Methods know nothing of
layouts: they see groups of tensors, whatever these are called in the models.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from mergetool.tensors.source import ModelSource

Sources = Mapping[str, ModelSource]
"""The opened models of a recipe, and the base under "base"."""

_REGISTRY: dict[str, type["Layout"]] = {}
_SERVING: dict[str, type["Layout"]] = {}


@dataclass(frozen=True)
class Origin:
    """One output tensor: its name, and what it is called in each source that has it."""

    name: str
    tensors: Mapping[str, str]
    models: tuple[str, ...]
    """The models that should have it, in the recipe's order."""
    extra: bool = False
    """Whether the base lacks it, which leads."""
    copy_of: str | None = None
    """The source whose tensor it is as it stands, whatever the method."""
    settings: tuple[int, ...] = ()
    """Numbers of the layout's own overrides that hold here, the first one first, before those of the recipe."""
    within: float = 0.0
    """How far along the part that these overrides are of it lies, from 0 to 1: their gradients run there."""
    base: str = "base"
    """The source that a method takes for the base here; what it calls the tensor is under "base"."""


@dataclass(frozen=True)
class Arrangement:
    """All output tensors in the order in which they are written."""

    origins: Sequence[Origin]
    layers: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """Where layers were taken from, by what stands before their number: (model, layer there) for each in order.

    Only for those that are not the leader's own in their own order: config.json follows it."""
    sources: Sources = field(default_factory=dict)
    """Further sources, of tensors that no model has; a stage of the method fills them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are other than the leader's, where the result is another network."""
    remarks: tuple[str, ...] = ()
    """What is unusual about it."""


class Problem(NamedTuple):
    """Something wrong with a layout's sections: where in the recipe, what, and how to mend it."""

    place: tuple[str | int, ...]
    what: str
    fix: str


class Layout(BaseModel):
    """Common to all layouts: strict frozen sections."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chooses: ClassVar[bool] = False
    """Whether not every model has a part in every tensor; how many there are at most is then seen when planning."""

    serves: ClassVar[str | None] = None
    """The method that it comes with: its settings are those of the method, it has no sections."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if cls.serves is not None:
            _SERVING[cls.serves] = cls
        elif cls.model_fields:
            _REGISTRY[next(iter(cls.model_fields))] = cls

    @classmethod
    def of(cls, method: Any) -> "Layout":
        """The layout that comes with a method."""
        values: dict[str, Any] = {"method": method}
        return cls.model_construct(**values)

    @abstractmethod
    def arrange(self, sources: Sources, leader: str, models: Sequence[str]) -> Arrangement:
        """Where every output tensor comes from, by headers alone. Raises PlanError."""

    def problems(self, models: Sequence[str], has_base: bool) -> Iterator[Problem]:
        """What is wrong with the sections, seen together with the names of the models."""
        return iter(())

    def taking(self, models: Sequence[str]) -> Sequence[str]:
        """Those of the models that have a part in the result."""
        return models

    def overrides(self) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Any]]]:
        """Overrides that the sections hold, with their places in the recipe."""
        return iter(())


def all_layouts() -> dict[str, type[Layout]]:
    """Every registered layout by its first section."""
    return dict(sorted(_REGISTRY.items()))


def serving_layouts() -> dict[str, type[Layout]]:
    """Every registered layout that comes with a method, by the method's name."""
    return dict(_SERVING)
