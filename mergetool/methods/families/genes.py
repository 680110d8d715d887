"""Search ranges inside the settings of a method: which genes they make, and the settings that genes stand for.

density: {search: [0.1, 0.9]}                 one gene; per-model settings get one for every model
density: {search: [0.1, 0.9], step: 0.1}      on a grid
weight: {math: {search: [0, 1]}, code: 0.5}   only for this model
scale: {search: [0.3, 1.0], groups: 3}        one gene for each of 3 groups of layers: knots of a gradient
weight: {search: [0, 1], shared: true}        one gene for all models
boundary: {choices: [keep, drop]}             one of these
overrides: [{match: "*.mlp.*", t: {search: [0, 1]}}]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from mergetool.methods.base import Finite, Method, Schedulable, all_methods
from mergetool.search.space import Gene, Value

Path = tuple[str | int, ...]


class Range(BaseModel):
    """A setting to be searched: bounds, or choices."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"oneOf": [{"required": ["search"]}, {"required": ["choices"]}]},
    )

    search: (
        Annotated[tuple[Finite, Finite], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] | None
    ) = Field(None, description="[low, high] of a number")
    choices: tuple[Any, ...] = Field((), description="or the values among which one is chosen")
    init: Finite | None = Field(None, description="where the search starts; else in the middle")
    step: Annotated[Finite, Field(gt=0)] | None = Field(None, description="only low, low + step, ...")
    groups: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="groups of layers, each with a number of its own"
    )
    shared: bool = Field(False, description="one number for all models")

    @model_validator(mode="after")
    def _is_sound(self) -> "Range":
        if (self.search is None) == (not self.choices):
            raise ValueError("give either `search: [low, high]` or `choices: [...]`")
        if self.search is None:
            return self
        low, high = self.search
        if not low < high:
            raise ValueError(f"a search range goes up, but {low} is not below {high}")
        if self.init is not None and not low <= self.init <= high:
            raise ValueError(f"init {self.init} is not between {low} and {high}")
        if self.step is not None and self.step > high - low:
            raise ValueError(f"a step of {self.step} is longer than the range from {low} to {high}")
        return self

    def gene(self, name: str) -> Gene:
        """This range as one gene."""
        if self.search is None:
            return Gene(name, choices=self.choices)
        return Gene(name, *self.search, init=self.init, step=self.step)


@dataclass(frozen=True)
class Inner:
    """The settings of the method that is searched, with ranges left in."""

    settings: Mapping[str, Any]

    @property
    def kind(self) -> type[Method]:
        """The class of the method."""
        return all_methods()[self.settings["method"]]

    def ranges(self) -> dict[Path, Range]:
        """Every range, by where it was written."""
        return dict(_ranges(self.settings, ()))

    def genes(self, models: Sequence[str], groups: int) -> tuple[Gene, ...]:
        """One gene for each number to be found, in the order in which they were written."""
        return tuple(gene for places in self._places(models, groups).values() for gene in _flat(places))

    def filled(self, values: Sequence[Value], models: Sequence[str], groups: int) -> dict[str, Any]:
        """The settings in which every range is replaced by the values of its genes."""
        left = iter(values)
        made = {path: _fill(places, left) for path, places in self._places(models, groups).items()}
        return {str(key): _replaced(value, (key,), made) for key, value in self.settings.items()}

    def _places(self, models: Sequence[str], groups: int) -> dict[Path, Any]:
        schedulables = self.kind.schedulables()
        return {path: _expand(path, span, schedulables, models, groups) for path, span in self.ranges().items()}


def _ranges(node: Any, path: Path) -> "list[tuple[Path, Range]]":
    if isinstance(node, Mapping) and ("search" in node or "choices" in node):
        try:
            return [(path, Range.model_validate(dict(node)))]
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            said = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{'.'.join(map(str, (*path, *first['loc'])))}: {said}") from None
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    return [each for key, value in items for each in _ranges(value, (*path, key))]


def _expand(
    path: Path, span: Range, schedulables: Mapping[str, Schedulable], models: Sequence[str], groups: int
) -> Any:
    """The genes of a range, nested as the setting will be: a gene, a gradient of genes, or a mapping from models."""
    name = ".".join(map(str, path))
    field_at = 2 if path[0] == "overrides" else 0
    schedulable = schedulables.get(str(path[field_at])) if len(path) > field_at else None
    inside = len(path) > field_at + 1
    per_model = schedulable is not None and schedulable.per_model and not inside and not span.shared
    layered = schedulable is not None and "gradient" not in path and span.search is not None
    count = span.groups or (groups if layered else 1)

    def knots(label: str) -> Any:
        if not layered or count == 1:
            return span.gene(label)
        return {"gradient": [span.gene(f"{label}[{index}]") for index in range(count)]}

    return {model: knots(f"{name}.{model}") for model in models} if per_model else knots(name)


def _flat(places: Any) -> "list[Gene]":
    if isinstance(places, Gene):
        return [places]
    nested = places.values() if isinstance(places, Mapping) else places
    return [gene for part in nested for gene in _flat(part)]


def _fill(places: Any, values: Any) -> Any:
    if isinstance(places, Gene):
        return next(values)
    if isinstance(places, Mapping):
        return {key: _fill(part, values) for key, part in places.items()}
    return [_fill(part, values) for part in places]


def _replaced(node: Any, path: Path, made: Mapping[Path, Any]) -> Any:
    if path in made:
        return made[path]
    if isinstance(node, Mapping):
        return {key: _replaced(value, (*path, key), made) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, (*path, index), made) for index, value in enumerate(node)]
    return node


def _parsed(value: Any) -> Any:
    if isinstance(value, Inner):
        return value
    if not isinstance(value, Mapping) or "method" not in value:
        raise ValueError("expected a mapping with `method`")
    known = {name for name, kind in all_methods().items() if kind.merges}
    if value["method"] not in known:
        raise ValueError(f"expected one of the methods {', '.join(sorted(known))}")
    inner = Inner(dict(value))
    ranges = inner.ranges()
    if not ranges:
        raise ValueError("nothing to search: give a setting a range such as {search: [0, 1]}")
    return inner


InnerMethod = Annotated[
    Inner,
    BeforeValidator(_parsed),
    WithJsonSchema({"type": "object", "properties": {"method": {"type": "string"}}, "required": ["method"]}),
]
"""A field that holds a method's settings with search ranges in them."""
