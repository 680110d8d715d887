"""Make a plan: open the models, match their tensors, resolve every number, lay the output out.

names      the base's tensors (or all models' together, where a method uses no base), in file order
steps      per tensor: which models take part, copy or merge, numbers at this depth, overrides applied
shards     steps dealt into files in order, each file with its exact header
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mergetool.bundle.present import present
from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.checkpoints.family import assemble
from mergetool.errors import PlanError, at
from mergetool.planning.adapters import as_adapter, of_adapters
from mergetool.planning.alone import as_models
from mergetool.planning.draft import Draft
from mergetool.planning.graph import BASE, Plan, Shard, Slot, Step, compute_bits
from mergetool.planning.inner import NONE, PlannedModel, place_of, with_inner
from mergetool.planning.measures import check_measured_once, data_files, statistics_of
from mergetool.planning.numbers import with_numbers
from mergetool.planning.outcome import check_vocabulary, words_about_result
from mergetool.planning.parents import check_shares, words_about
from mergetool.planning.passes import with_partners, with_passes
from mergetool.planning.sources import Lookup, Provenance
from mergetool.planning.sweep import swept
from mergetool.planning.words import in_one_vocabulary
from mergetool.recipe.adapters import on_their_base
from mergetool.recipe.candidate import first_candidate, settled
from mergetool.recipe.schema import Recipe
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.sets import UNSPLIT
from mergetool.tensors.source import FileStamp, ModelSource
from mergetool.tensors.writer import parts_path


def make_plan(
    recipe: Recipe,
    output: Path | None = None,
    sources: Mapping[str, ModelSource] | None = None,
    lookup: Lookup | None = None,
    *,
    whole: bool = False,
    parts: Path | None = None,
    statistics: Mapping[str, ModelSource] | None = None,
) -> Plan:
    """Plan a recipe from headers. `sources` stand in for the recipe's models (in memory), `statistics` for what is
    measured on them; `lookup` looks others up.

    Of weights nothing is read but samples of tied tensors that are stored twice; with `whole`, all of those.

    Recipes inside this one are planned with it; `parts` is the folder in which their results will lie.

    Of a search, the plan of its first candidate: the others differ in numbers only.
    Raises SourceError or HubError for models that cannot be read, PlanError for models that do not fit together.
    """
    if recipe.points:
        given: dict[str, Any] = {"whole": whole, "parts": parts, "statistics": statistics}
        one = partial(make_plan, output=output, sources=sources, lookup=lookup, **given)
        return swept(recipe, output, partial(_point, one))
    lookup = lookup or Lookup(recipe.folder)
    if output is None and recipe.output.path is not None:
        output = recipe.path_of(recipe.output.path)
    parts = parts or parts_path(output or recipe.folder / "result")
    inner = {name: _inner(name, each, lookup, parts, whole=whole) for name, each in recipe.inner.items()}
    opened = dict(sources) if sources is not None else open_models(recipe, lookup, inner)
    if recipe.method.searches:
        recipe = first_candidate(settled(recipe, opened))
    _check_adapters(recipe)
    if recipe.adapters_alone:
        return _of_adapters(recipe, opened, output, lookup)
    if recipe.method.result == "bundle" and BASE in opened:
        opened = present(opened, [name for name, reference in recipe.models.items() if reference.head is not None])
    plan = with_inner(_planned(recipe, opened, output, lookup, statistics or {}, whole=whole), inner)
    if recipe.result == "adapter":
        return as_adapter(plan)
    check_vocabulary(plan)
    plan = replace(plan, warnings=(*plan.warnings, *words_about_result(plan)))
    if recipe.result != "bundle":
        return plan
    from mergetool.planning.bundles import as_bundle

    return as_bundle(plan)


def _point(make: Callable[[Recipe], Plan], first: Plan | None, recipe: Recipe) -> Plan:
    """The plan of one result of a sweep: that of the first with other numbers, where nothing else depends on them."""
    if first is None:
        return make(recipe)
    check_measured_once(first.recipe.method.kernel(), recipe.method.kernel())
    return make(recipe) if first.forms or recipe.layout_overrides else with_numbers(first, recipe)


def _check_adapters(recipe: Recipe) -> None:
    """Raise PlanError where whole models meet a method for adapters by themselves."""
    why = recipe.method.needs_adapters
    if why and not recipe.adapters_alone:
        what = f"{recipe.method.method_name()} merges nothing but adapters by themselves: {why}"
        fix = "write every model as {adapter: PATH} and output: {kind: adapter}, or choose merge: {method: linear}"
        raise PlanError(what, "merge.method", fix)


def _of_adapters(recipe: Recipe, opened: Mapping[str, ModelSource], output: Path | None, lookup: Lookup) -> Plan:
    """The plan of adapters by themselves; on their base where they mean nothing without it."""
    adapters = {name: source for name, source in opened.items() if isinstance(source, AdapterAlone)}
    needing = {name: source.needs_base[0] for name, source in adapters.items() if source.needs_base}
    if not needing:
        models = as_models(recipe, adapters, opened.get(BASE))
        if recipe.base is not None and not models[BASE].files:
            lookup.only_named(recipe.base.source)
        return of_adapters(_planned(recipe, models, output, lookup, {}, whole=False), adapters)
    name, why = next(iter(needing.items()))
    if recipe.base is None:
        raise PlanError(
            f"it needs its base: {why}", f"model {name!r}", "add base: MODEL, and output: {kind: adapter, rank: 32}"
        )
    if recipe.output.rank is None:
        raise PlanError(f"no few directions hold what it changes: {why}", f"model {name!r}", "add output: {rank: 32}")
    return make_plan(on_their_base(recipe), output, lookup=lookup)


def _past(recipe: Recipe) -> dict[str, tuple[Provenance, ...]]:
    """Where models that are taken from an earlier result came from."""
    return {name: tuple(Provenance(**each) for each in told) for name, told in recipe.past.origins.items()}


def _planned(
    recipe: Recipe,
    opened: Mapping[str, ModelSource],
    output: Path | None,
    lookup: Lookup,
    statistics: Mapping[str, ModelSource],
    *,
    whole: bool,
) -> Plan:
    """The plan of opened models, with all that is to be said of them."""
    template = BASE if BASE in opened else next(iter(recipe.models))
    family = assemble(opened, template, whole=whole)
    measured = statistics_of(recipe, family.sources, statistics, lookup)
    vocabulary = in_one_vocabulary(recipe, family.sources, template, lookup)
    family = replace(family, sources=vocabulary.sources)
    draft = Draft(recipe, family, template, vocabulary.rows, measured)
    steps = _counted(recipe, draft.sources, draft.steps())
    specs = {slot.spec.name: slot.spec for step in steps for slot in step.slots}
    stem, limit = opened[template].stem, recipe.output.shard_size
    shards = _shards([specs[each.name] for each in draft.arrangement.origins if each.name in specs], stem, limit)
    remarks = (*recipe.warnings, *lookup.warnings, *family.remarks, *vocabulary.remarks, *draft.warnings)
    stacked = bool(draft.arrangement.layers)
    about = words_about(recipe, family.sources, template, steps, stacked=stacked)
    words = (*check_shares(recipe, family.sources, steps), *about)
    return Plan(
        recipe,
        draft.sources,
        template,
        _place(steps, shards),
        tuple(shards),
        output,
        warnings=(*remarks, *words, *_unsplit(shards, stem, limit)),
        origins=lookup.origins | _past(recipe),
        bytes_missing=sum(lookup.missing.values()),
        untied=family.untied,
        layers=draft.arrangement.layers,
        config=draft.arrangement.config,
        narrow=draft.narrow,
        others={**_other_files(recipe), **vocabulary.read},
        words=vocabulary,
    )


def _other_files(recipe: Recipe) -> dict[str, FileStamp]:
    stamps = {}
    files = {field: recipe.path_of(path) for field, path in recipe.method.files().items()}
    files |= dict(data_files(recipe))
    if (path := recipe.architecture_file) is not None:
        files["architecture"] = path
    for field, path in files.items():
        with at(field):
            stamps[field] = FileStamp.of(path)
    return stamps


def _inner(name: str, recipe: Recipe, lookup: Lookup, parts: Path, *, whole: bool) -> Plan:
    """The plan of a recipe inside another one, whose result lies among the others until it has been read."""
    with at(name):
        plan = make_plan(recipe, lookup=lookup.inside(recipe.folder), whole=whole, parts=parts)
    return replace(plan, output=place_of(plan, parts))


def open_models(recipe: Recipe, lookup: Lookup, inner: Mapping[str, Plan] = NONE) -> dict[str, ModelSource]:
    """Every model of a recipe, the base under `BASE`; of those that other recipes make (`inner`) what is planned.

    Raises SourceError, HubError or PlanError.
    """
    opened: dict[str, ModelSource] = {}
    references = {**({BASE: recipe.base} if recipe.base else {}), **recipe.models}
    for name, reference in references.items():
        with at("base" if name == BASE else f"model {name!r}"):
            if reference.adapter is not None:
                opened[name] = lookup.open_adapter(name, reference.adapter, opened.get(BASE))
            elif name in inner:
                opened[name] = lookup.adapted(name, PlannedModel(inner[name]), reference.adapters)
            else:
                opened[name] = lookup.open(name, reference.source, reference.adapters, reference.select)
    return opened


def _counted(recipe: Recipe, sources: Mapping[str, ModelSource], steps: Sequence[Step]) -> list[Step]:
    """The steps with their partners and the passes that come first."""
    stored = (sources[each.source].specs[each.tensor] for step in steps for each in step.operands)
    return with_partners(with_passes(steps, compute_bits(recipe, stored)))


def _shards(specs: Sequence[TensorSpec], stem: str, limit: int) -> list[Shard]:
    """Files as the template's library calls them; as many as it opens."""
    groups = list(_filled(specs, sys.maxsize if stem in UNSPLIT else limit))
    named = [
        f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{index:05d}-of-{len(groups):05d}.safetensors"
        for index in range(1, len(groups) + 1)
    ]
    return [Shard(name, *lay_out(group, {"format": "pt"})) for name, group in zip(named, groups, strict=True)]


def _unsplit(shards: Sequence[Shard], stem: str, limit: int) -> list[str]:
    if stem not in UNSPLIT or shards[0].header.file_size <= limit:
        return []
    return [f"output.shard_size is passed over: {shards[0].name} stays one file, which is all that its library opens"]


def _filled(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one gets a file of its own."""
    group: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if group and size + spec.num_bytes > limit:
            yield group
            group, size = [], 0
        group.append(spec)
        size += spec.num_bytes
    yield group


def _place(steps: Sequence[Step], shards: Sequence[Shard]) -> tuple[Step, ...]:
    shard_of = {name: index for index, shard in enumerate(shards) for name in shard.header.slots}
    return tuple(
        replace(step, index=index, slots=tuple(Slot(slot.spec, shard_of[slot.spec.name]) for slot in step.slots))
        for index, step in enumerate(steps)
    )
