"""Layers cut, stacked, repeated and merged: `slices` says where each layer of the output comes from, bottom to top.

    slices:
      - {a: [0, 16]}                    # layers 0 to 15 of a, as they are
      - {a: [16, 24], b: [8, 16]}       # eight layers, merged by `merge` from those of a and of b
      - {layers: {b: [20, 24]}, set: {scale: 0.5}, overrides: [{match: "*.o_proj.weight", scale: 0.0}]}
    outside: {first: a, last: b}

Layers are counted from 0, and the last number is not part of the slice, as in Python. A slice of one model is copied,
unless it has settings (`set`, `overrides`) for the method, or names a base. A gradient in settings runs along the
slice's own layers.
What lies outside the layers comes from the models of the first slice (embeddings and what goes with them) and of the
last one (final norm, head), or from those that `outside` names; with `outside: true` such a slice's settings hold
there, too. A method with a base sees the base's layers of the same numbers; where the models' numbers differ, the slice
names them: `{a: [16, 24], b: [8, 16], base: [16, 24]}`, or those of another model that is its base:
`{layers: {a: [16, 24], b: [8, 16]}, base: {c: [8, 16]}}`.

Of a network with several rows of layers, a list means those of the text (of an encoder-decoder: the decoder), and a
mapping names the rows: `slices: {encoder: [{a: [0, 4]}], decoder: [{b: [2, 6]}]}`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from mergetool.checkpoints.rows import End, Outside, chosen_row, layers_of, rows_of
from mergetool.errors import PlanError
from mergetool.layouts.base import Arrangement, Layout, Origin, Problem, Sources
from mergetool.layouts.same import Same
from mergetool.layouts.slice import AnySlice, Slice, SlicePart
from mergetool.layouts.stacking import Placed, StackedRow, having
from mergetool.tensors.side_files import read_config

_BASE = "base"


class OutsideSection(SlicePart):
    """Whose tensors outside the layers are taken."""

    first: str | None = Field(None, description="the model whose embeddings are taken (all models of the first slice)")
    last: str | None = Field(None, description="the model whose final norm and head are taken (of the last slice)")


Stack = Annotated[tuple[AnySlice, ...], Field(min_length=1)]
Stacks = Annotated[
    Annotated[Stack, Tag("(one row)")] | Annotated[dict[str, Stack], Field(min_length=1), Tag("(rows)")],
    Discriminator(lambda value: "(rows)" if isinstance(value, dict) else "(one row)"),
]


class Slices(Layout):
    """Layers of the output, bottom to top."""

    chooses: ClassVar = True

    slices: Stacks = Field(
        description="where the layers of the output come from, bottom to top: MODEL: [first, end); "
        "ROW: [slices] where a network has several rows of layers"
    )
    outside: OutsideSection = Field(OutsideSection(), description="whose embeddings, final norm and head are taken")

    @property
    def stacks(self) -> Mapping[str, tuple[Slice, ...]]:
        """Slices by the row that they are of, "" where the recipe names none."""
        return self.slices if isinstance(self.slices, dict) else {"": self.slices}

    def _placed(self) -> Iterator[tuple[tuple[str | int, ...], Slice]]:
        for key, stack in self.stacks.items():
            for index, each in enumerate(stack):
                yield (*(("slices", key) if key else ("slices",)), index), each

    def problems(self, models: Sequence[str], has_base: bool) -> Iterator[Problem]:
        known = [*models, *([_BASE] if has_base else [])]
        for place, each in self._placed():
            yield from _problems_of(place, each, known)
        for key, stack in self.stacks.items():
            for index, each in enumerate(stack[1:-1], 1):
                if each.outside:
                    place = ("slices", key, index) if key else ("slices", index)
                    yield Problem(place, "nothing lies beside a slice between others", "remove `outside`")
        for key in ("first", "last"):
            name = getattr(self.outside, key)
            if name is not None and name not in known:
                yield Problem(("outside", key), f"there is no model {name!r}", f"one of: {', '.join(known)}")
        used = self.taking(models)
        for name in models:
            if name not in used:
                yield Problem(("models", name), f"model {name!r} is in no slice", "remove it, or add it to a slice")

    def taking(self, models: Sequence[str]) -> Sequence[str]:
        used = {name for _, each in self._placed() for name in each.spans} | {self.outside.first, self.outside.last}
        return [name for name in models if name in used]

    def overrides(self) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Any]]]:
        for place, each in self._placed():
            for number, override in enumerate(each.overrides):
                yield (*place, "overrides", number), override
            if each.set:
                yield (*place, "set"), {"match": "*", **each.set}

    def arrange(self, sources: Sources, leader: str, models: Sequence[str]) -> Arrangement:
        names = {name for source in sources.values() for name in source.specs}
        rows = rows_of(names)
        stacks: dict[str, list[Placed]] = {}
        settings = 0
        for key, stack in self.stacks.items():
            placed = stacks[_row(rows, key, stacks)] = []
            for each in stack:
                count = len(each.overrides) + bool(each.set)
                placed.append(Placed(each, tuple(range(settings, settings + count))))
                settings += count
        if self._is_everything(sources, rows, stacks):
            return Same().arrange(sources, leader, models)
        begin, end = self._outside(sources, leader, rows, stacks)
        stacked = {row: StackedRow(sources, leader, row) for row in stacks}
        inside = [origin for row, stack in stacks.items() for origin in stacked[row].stacked(stack)]
        taken = {row: _taken(stack) for row, stack in stacks.items()}
        words = _told(taken, rows) if "" in self.stacks else ()
        words += tuple(word for row in stacked.values() for word in row.words)
        return Arrangement([*begin, *inside, *end], taken, remarks=words)

    def _is_everything(
        self, sources: Sources, rows: Mapping[str, int], stacks: Mapping[str, Sequence["Placed"]]
    ) -> bool:
        """Whether all layers of all models are merged in their own order: then these are whole models."""
        if len(stacks) != 1 or self.outside.first or self.outside.last:
            return False
        ((row, stack),) = stacks.items()
        only = stack[0].slice
        named = {*only.layers, *([_BASE] if only.base is None and len(set(only.layers.values())) == 1 else [])}
        ends = {(0, len(layers_of(source.specs, row))) for source in sources.values()}
        plain = len(stack) == 1 and not stack[0].settings and set(sources) <= named
        return plain and len(rows) == 1 and ends == set(only.layers.values())

    def _outside(
        self, sources: Sources, leader: str, rows: Mapping[str, int], stacks: Mapping[str, Sequence["Placed"]]
    ) -> tuple[list[Origin], list[Origin]]:
        """Tensors outside the layers: those before them, those behind."""
        shapes = {name: spec.shape for name, spec in sources[leader].specs.items()}
        outside = Outside(stacks, rows, shapes, str(read_config(sources[leader].folder).get("model_type", "")))
        by_end: dict[End, list[Origin]] = {"first": [], "last": []}
        for end, origins in by_end.items():
            for row, stack in stacks.items():
                placed = stack[0 if end == "first" else -1]
                named = getattr(self.outside, end)
                model = named or placed.slice.models[0]
                for name in sorted(sources[model].specs, key=sources[model].position):
                    if outside.of(name) == (row, end):
                        origins.append(_beside(sources, name, placed, named))
        return by_end["first"], by_end["last"]


def _problems_of(place: tuple[str | int, ...], each: Slice, known: Sequence[str]) -> Iterator[Problem]:
    spans = [*each.layers.items(), *(each.base or {}).items()]
    for name, (start, end) in spans:
        if name not in known:
            yield Problem(place, f"there is no model {name!r}", f"one of: {', '.join(known)}")
        if end <= start:
            fix = f"write [{start}, {start + 1}] for one layer"
            yield Problem(place, f"[{start}, {end}] of {name} holds no layer: the end is not part of it", fix)
    lengths = [(name, end - start) for name, (start, end) in spans]
    if len({length for _, length in lengths}) > 1:
        told = ", ".join(f"{length} of {name}" for name, length in lengths)
        yield Problem(place, f"layers are merged one by one, but there are {told}", "give as many of each")
    if each.base and _BASE in each.layers:
        yield Problem(place, "the base of this slice is named twice", "keep `base` inside `layers`, or beside it")
    if each.base and _BASE not in known:
        yield Problem(place, "a slice has a base, and the recipe has none", "add base: PATH at the top")
    if each.outside and not (each.set or each.overrides):
        yield Problem(place, "`outside` is about settings, and this slice has none", "remove `outside`, or add `set`")


def _row(rows: Mapping[str, int], key: str, named: Mapping[str, Any]) -> str:
    row = chosen_row(rows, key)
    if row in named:
        raise PlanError(f"{key!r} names {row}, which another key names, too", f"slices: {key}", "join their slices")
    return row


def _told(taken: Iterable[str], rows: Iterable[str]) -> tuple[str, ...]:
    """Which row a list of slices was taken to mean, where there are several."""
    others = sorted(set(rows) - set(taken))
    if not others:
        return ()
    mine = next(iter(taken))
    fix = f"slices: {{{others[0]}: [...]}}"
    return (f"slices are taken to be of {mine}; those of {', '.join(others)} are left whole ({fix} means those)",)


def _taken(stack: Sequence[Placed]) -> tuple[tuple[str, int], ...]:
    """Where each layer of a row comes from: (model, layer there)."""
    return tuple(
        (each.slice.models[0], each.slice.layers[each.slice.models[0]][0] + offset)
        for each in stack
        for offset in range(each.slice.length)
    )


def _beside(sources: Sources, name: str, placed: Placed, named: str | None) -> Origin:
    """A tensor outside the layers, of one model as it is, or merged from several."""
    models = (named,) if named else placed.slice.models
    settings = placed.settings if placed.slice.outside and not named else ()
    alone = named is not None or (placed.slice.is_of_one and not settings)
    base = placed.slice.own_base
    return Origin(
        name,
        having(sources, dict.fromkeys((*models, _BASE), name), base),
        models,
        copy_of=models[0] if alone else None,
        settings=settings,
        base=base,
    )
