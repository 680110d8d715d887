"""The models of a recipe beside each other: opened, under one set of names, in the vocabulary of the first.

What is measured are the floating-point tensors that all of them have in one shape. Rows of tokens that not all of them
know are left out.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.checkpoints.family import assemble
from mergetool.checkpoints.other_rows import OtherRows, Rows
from mergetool.checkpoints.vocabulary import tokens_of
from mergetool.checkpoints.vocabulary_axes import axes_of
from mergetool.engine.processes import Team
from mergetool.engine.progress import Progress
from mergetool.engine.run import Flags, run_inner
from mergetool.errors import PlanError
from mergetool.outputs.settings_beside import settings_beside
from mergetool.planning import Plan, make_plan
from mergetool.planning.alone import as_models
from mergetool.planning.build import open_models
from mergetool.planning.graph import BASE
from mergetool.planning.sources import Lookup
from mergetool.recipe.adapters import on_their_base
from mergetool.recipe.schema import Recipe
from mergetool.tensors.source import ModelSource

Reference = Literal["base", "mean", "zero"]
"""What changes are measured from: the base, the mean of the models, or nothing (adapters are changes)."""
Row = dict[str, Any]


@dataclass(frozen=True)
class OtherNumbers:
    """A model some of whose rows are of other tokens than the rows of the same numbers in the first one."""

    stored: ModelSource
    """With its rows as they are."""
    rows: tuple[int, ...]
    share: float
    """Of all rows that both have."""

    @classmethod
    def of(cls, first: ModelSource, other: ModelSource) -> "OtherNumbers | None":
        ours, theirs = (tokens_of(source.tokenizer_folder) or {} for source in (first, other))
        both = sorted(ours.keys() & theirs.keys())
        rows = tuple(number for number in both if ours[number] != theirs[number])
        return cls(other, rows, len(rows) / len(both)) if rows else None


@dataclass(frozen=True)
class Beside:
    """All models of a recipe, ready to be read."""

    sources: Mapping[str, ModelSource]
    """Under the first one's names and rows; the base, where there is one, first."""
    models: tuple[str, ...]
    reference: Reference
    opened: Mapping[str, ModelSource]
    """The same under their own names."""
    tokens: frozenset[str] = frozenset()
    """Tensors with a row for every token."""
    skipped: Mapping[str, Rows] = field(default_factory=dict)
    """Rows that are not compared, by tensor."""
    renumbered: "Mapping[str, OtherNumbers]" = field(default_factory=dict)
    """Models whose tokenizers say that some rows are of other tokens than in the first one."""
    settings: tuple[Row, ...] = ()
    """What lies beside the weights of a model and is not as beside the first one's."""
    remarks: tuple[str, ...] = ()

    @cached_property
    def leader(self) -> str:
        return next(iter(self.sources))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that are measured, in the order of the first model's files."""
        first, *others = self.sources.values()
        alike = [
            name
            for name, spec in first.specs.items()
            if all(name in each.specs and each.specs[name].shape == spec.shape for each in others)
            and all(each.specs[name].dtype.is_float for each in self.sources.values())
            and spec.num_elements
        ]
        return tuple(sorted(alike, key=first.position))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sources[self.leader].specs[name].shape

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor as a matrix: a convolution reads all of its kernel."""
        shape = self.shape(name)
        return shape[0], math.prod(shape[1:])

    def missing(self) -> Iterator[Row]:
        """Tensors that not all models have, or have in one shape."""
        every = dict.fromkeys(name for source in self.sources.values() for name in source.specs)
        for name in every:
            lacking = [model for model, source in self.sources.items() if name not in source.specs]
            if lacking:
                yield {"tensor": name, "models": lacking, "why": "missing"}
                continue
            shapes = {model: list(source.specs[name].shape) for model, source in self.sources.items()}
            first = shapes[self.leader]
            if other := [model for model, shape in shapes.items() if shape != first]:
                yield {"tensor": name, "models": other, "why": "shape", "shapes": [first, shapes[other[0]]]}


@contextmanager
def beside(recipe: Recipe, progress: Progress) -> Iterator[Beside]:
    """The models of a recipe, until the block ends. Raises PlanError, SourceError or HubError.

    Recipes inside it are run first, into a folder that is removed in the end.
    """
    _check_layout(recipe)
    with ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="mergetool-analyze-"))
        lookup = Lookup(recipe.folder)
        found = _opened(recipe, lookup, Path(folder))
        if lookup.missing:
            lookup.fetch(progress.say)
            lookup.warnings.clear()
            found = _opened(recipe, lookup, Path(folder))
        if found.plan is not None:
            run_inner(found.plan, {}, Flags(), progress, Team())
        for source in found.sources.values():
            held.enter_context(closing(source))
        yield _beside(found, tuple(recipe.models), lookup.warnings)


def _check_layout(recipe: Recipe) -> None:
    """Raise PlanError where tensors of one name do not belong together."""
    kind = type(recipe.layout).__name__.lower()
    if kind == "slices":
        what = "a recipe of slices puts layers of several depths together, and tensors are compared by their names here"
        fix = "analyze its models by themselves: a recipe with the same models, without slices, and merge: "
        raise PlanError(what, "slices", fix + "{method: linear}")


@dataclass(frozen=True)
class _Opened:
    """Models as they are in their files, or as recipes inside will make them."""

    sources: Mapping[str, ModelSource]
    reference: Reference
    plan: Plan | None = None
    """With the recipes inside, where there are any."""


def _opened(recipe: Recipe, lookup: Lookup, folder: Path) -> _Opened:
    """All models; results of recipes inside will lie in the folder."""
    if recipe.adapters_alone:
        if recipe.base is not None:
            return _opened(replace(on_their_base(recipe), base=recipe.base), lookup, folder)
        adapters = open_models(recipe, lookup)
        alone = {name: source for name, source in adapters.items() if isinstance(source, AdapterAlone)}
        return _Opened(as_models(recipe, alone, None), "zero")
    plan = make_plan(recipe, folder / "result", lookup=lookup, whole=True) if recipe.inner else None
    opened = open_models(recipe, lookup, {} if plan is None else plan.inner)
    return _Opened(opened, "base" if BASE in opened else "mean", plan)


def _beside(found: _Opened, models: tuple[str, ...], warnings: list[str]) -> Beside:
    opened, reference = found.sources, found.reference
    leader = BASE if BASE in opened else models[0]
    family = assemble(opened, leader)
    ordered = {leader: family.sources[leader], **{name: family.sources[name] for name in models}}
    sources, renumbered, skipped = dict(ordered), dict[str, OtherNumbers](), dict[str, Rows]()
    settings: list[Row] = []
    for name, source in ordered.items():
        if name == leader or reference == "zero":
            continue
        rows = OtherRows(ordered[leader], source)
        sources[name] = rows.shown
        if (others := OtherNumbers.of(ordered[leader], source)) is not None:
            renumbered[name] = others
        for tensor, some in rows.skipped.items():
            skipped[tensor] = np.logical_or(skipped[tensor], some) if tensor in skipped else some
        settings += _settings(name, opened[leader], opened[name], rows)
    tokens = frozenset(axes_of(ordered[leader])) if reference != "zero" else frozenset()
    remarks = (*warnings, *family.remarks)
    return Beside(sources, models, reference, opened, tokens, skipped, renumbered, tuple(settings), remarks)


def _settings(name: str, leader: ModelSource, model: ModelSource, rows: OtherRows) -> Iterator[Row]:
    for each in settings_beside(leader, model, rows):
        yield {"model": name, "file": each.file, "key": each.key, "reference": each.a, "value": each.b}
