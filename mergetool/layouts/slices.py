"""Layers cut, stacked, repeated and merged: `slices` says where each layer of the output comes from, bottom to top.

    slices:
      - {a: [0, 16]}                    # layers 0 to 15 of a, as they are
      - {a: [16, 24], b: [8, 16]}       # eight layers, merged by `merge` from those of a and of b
      - {layers: {b: [20, 24]}, set: {scale: 0.5}, overrides: [{match: "*.o_proj.weight", scale: 0.0}]}
    outside: {first: a, last: b}

Layers are counted from 0, and the last number is not part of the slice, as in Python. A slice of one model is copied,
unless it has settings (`set`, `overrides`) for the method. What lies outside the layers comes from the models of the
first slice (embeddings and what goes with them) and of the last one (final norm, head), or from those that `outside`
names. A method with a base sees the base's layers of the same numbers; where the models' numbers differ, the slice
names them: `{a: [16, 24], b: [8, 16], base: [16, 24]}`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mergetool.checkpoints.truth import TEXT_LAYERS, layer_counts
from mergetool.errors import PlanError
from mergetool.layouts.base import Arrangement, Layout, Origin, Problem, Sources

_BASE = "base"
_FIRST = re.compile(r"(^|\.)\w*(embed|stem|shared|wte|wpe|rotary|patch)\w*(\.|$)")
"""What a network begins with; all else outside the layers is what it ends with."""


def _as_span(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(each) is int for each in value)
    if not whole or value[0] < 0:
        raise ValueError("expected the first layer and the end, as in [0, 16]")
    return tuple(value)


Span = Annotated[
    tuple[int, int],
    BeforeValidator(
        _as_span,
        json_schema_input_type=Annotated[list[int], Field(min_length=2, max_length=2)],
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(_Strict):
    """Some layers of one model, or as many of each of several."""

    layers: dict[str, Span] = Field(min_length=1, description="MODEL: [first, end), for each of the models")
    set: dict[str, Any] = Field({}, description="other settings of the method for these layers")
    overrides: tuple[dict[str, Any], ...] = Field((), description="overrides for tensors of these layers")

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are merged, or the one that is copied."""
        return tuple(name for name in self.layers if name != _BASE) or (_BASE,)

    @property
    def length(self) -> int:
        """How many layers it makes."""
        start, end = self.layers[self.models[0]]
        return end - start

    def layer(self, model: str, offset: int) -> int | None:
        """Which layer of a model goes into a layer of this slice; None where the recipe does not say."""
        if model in self.layers:
            return self.layers[model][0] + offset
        starts = {start for start, _ in self.layers.values()}
        return starts.pop() + offset if len(starts) == 1 else None


class Outside(_Strict):
    """Whose tensors outside the layers are taken."""

    first: str | None = Field(None, description="the model whose embeddings are taken (all models of the first slice)")
    last: str | None = Field(None, description="the model whose final norm and head are taken (of the last slice)")


def _long_form(value: Any) -> Any:
    """`{a: [0, 16]}` as `{layers: {a: [0, 16]}}`."""
    long = not isinstance(value, dict) or isinstance(value.get("layers"), dict)
    return value if long else {"layers": value}


AnySlice = Annotated[Slice, BeforeValidator(_long_form, json_schema_input_type=Slice | dict[str, Span])]


class Slices(Layout):
    """Layers of the output, bottom to top."""

    chooses: ClassVar = True

    slices: Annotated[tuple[AnySlice, ...], Field(min_length=1)] = Field(
        description="where the layers of the output come from, bottom to top: MODEL: [first, end)"
    )
    outside: Outside = Field(Outside(), description="whose embeddings, final norm and head are taken")

    def problems(self, models: Sequence[str], has_base: bool) -> Iterator[Problem]:
        known = [*models, *([_BASE] if has_base else [])]
        for index, each in enumerate(self.slices):
            place = ("slices", index)
            for name, (start, end) in each.layers.items():
                if name not in known:
                    yield Problem(place, f"there is no model {name!r}", f"one of: {', '.join(known)}")
                if end <= start:
                    fix = f"write [{start}, {start + 1}] for one layer"
                    yield Problem(place, f"[{start}, {end}] of {name} holds no layer: the end is not part of it", fix)
            lengths = {name: end - start for name, (start, end) in each.layers.items()}
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{length} of {name}" for name, length in lengths.items())
                yield Problem(place, f"layers are merged one by one, but there are {told}", "give as many of each")
        for key in ("first", "last"):
            name = getattr(self.outside, key)
            if name is not None and name not in known:
                yield Problem(("outside", key), f"there is no model {name!r}", f"one of: {', '.join(known)}")
        used = {name for each in self.slices for name in each.layers} | {self.outside.first, self.outside.last}
        for name in models:
            if name not in used:
                yield Problem(("models", name), f"model {name!r} is in no slice", "remove it, or add it to a slice")

    def overrides(self) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Any]]]:
        for index, each in enumerate(self.slices):
            for number, override in enumerate(each.overrides):
                yield ("slices", index, "overrides", number), override
            if each.set:
                yield ("slices", index, "set"), {"match": "*", **each.set}

    def arrange(self, sources: Sources, leader: str, models: Sequence[str]) -> Arrangement:
        tower = _tower({name for source in sources.values() for name in source.specs})
        inside: list[Origin] = []
        taken: list[tuple[str, int]] = []
        settings = 0
        for each in self.slices:
            mine = tuple(range(settings, settings + len(each.overrides) + bool(each.set)))
            settings += len(mine)
            for offset in range(each.length):
                inside += _layer(sources, tower, each, offset, len(taken), mine)
                layer = each.layer(each.models[0], offset)
                assert layer is not None
                taken.append((each.models[0], layer))
        first, last = (
            self._outside(sources, tower, kind)
            for kind in (self.outside.first or self.slices[0].models, self.outside.last or self.slices[-1].models)
        )
        begin = [each for each in first if _FIRST.search(each.name)]
        end = [each for each in last if not _FIRST.search(each.name)]
        return Arrangement([*begin, *inside, *end], {tower: tuple(taken)})

    def _outside(self, sources: Sources, tower: str, models: str | tuple[str, ...]) -> list[Origin]:
        """Tensors outside the layers, of one model as they are, or merged from several."""
        copied = models if isinstance(models, str) else models[0] if len(models) == 1 else None
        names = (models,) if isinstance(models, str) else models
        order = sorted(sources[names[0]].specs, key=sources[names[0]].position)
        return [
            Origin(name, _having(sources, dict.fromkeys((*names, _BASE), name)), names, copy_of=copied)
            for name in order
            if not name.startswith(f"{tower}.")
        ]


def _layer(
    sources: Sources, tower: str, each: Slice, offset: int, number: int, settings: tuple[int, ...]
) -> Iterator[Origin]:
    """The tensors of one layer of the output."""
    numbers = {name: each.layer(name, offset) for name in (*each.models, *([_BASE] if _BASE in sources else []))}
    alone = len(each.models) == 1 and not settings
    if numbers.get(_BASE, 0) is None and not alone:
        what = f"{' and '.join(each.models)} give layers of other numbers, and which are the base's is not said"
        raise PlanError(what, f"slices: {dict(each.layers)}", "add base: [first, end] to the slice")
    for name, layer in numbers.items():
        _check_layer(sources, tower, name, layer)
    leading = each.models[0]
    prefix = f"{tower}.{numbers[leading]}."
    own = [name for name in sources[leading].specs if name.startswith(prefix)]
    for name in sorted(own, key=sources[leading].position):
        suffix = name.removeprefix(prefix)
        tensors = {model: f"{tower}.{layer}.{suffix}" for model, layer in numbers.items() if layer is not None}
        yield Origin(
            f"{tower}.{number}.{suffix}",
            _having(sources, tensors),
            each.models,
            copy_of=leading if alone else None,
            settings=settings,
        )


def _having(sources: Sources, tensors: Mapping[str, str]) -> dict[str, str]:
    return {model: name for model, name in tensors.items() if model in sources and name in sources[model].specs}


def _check_layer(sources: Sources, tower: str, model: str, layer: int | None) -> None:
    count = layer_counts(sources[model].specs).get(tower, 0)
    if layer is not None and layer >= count:
        whose = "the base" if model == _BASE else f"model {model!r}"
        what = f"layer {layer} is asked for, and {whose} has layers 0 to {count - 1} ({tower})"
        raise PlanError(what, f"slices: {model}", f"write at most [.., {count}]")


def _tower(names: set[str]) -> str:
    """What stands before the numbers of the layers. Raises PlanError where that is not one thing."""
    towers = [tower for tower, count in layer_counts(names).items() if count > 1] or list(layer_counts(names))
    chosen = [tower for tower in towers if TEXT_LAYERS.fullmatch(tower)] or towers
    if len(chosen) != 1:
        told = ", ".join(sorted(chosen)) or "none"
        fix = "merge such networks without slices"
        raise PlanError(f"slices need a network with one row of numbered layers, and here are: {told}", "slices", fix)
    return chosen[0]
