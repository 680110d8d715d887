"""Make a plan: open the models, match their tensors, resolve every number, lay the output out.

names      the base's tensors (or all models' together, where a method uses no base), in file order
steps      per tensor: which models take part, copy or merge, numbers at this depth, overrides applied
shards     steps dealt into files in order, each file with its exact header
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from mergetool.arch.depth import structural_depths
from mergetool.bundle.present import present
from mergetool.errors import PlanError, at
from mergetool.methods.base import BundleMethod, FittedMethod, Method, SearchMethod, TensorMethod
from mergetool.planner.lookup import Lookup
from mergetool.planner.model import BASE, Plan, Shard, Step
from mergetool.recipe.load import candidate_recipe
from mergetool.recipe.model import Override, Recipe
from mergetool.tensors.dtypes import BY_TORCH_NAME, DType
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource

_MAX_LISTED = 8


def make_plan(
    recipe: Recipe,
    output: Path | None = None,
    sources: Mapping[str, ModelSource] | None = None,
    lookup: Lookup | None = None,
) -> Plan:
    """Plan a recipe from headers. `sources` stand in for the recipe's models (in memory); `lookup` looks others up.

    Of a search, the plan of its first candidate: the others differ in numbers only.
    Raises SourceError or HubError for models that cannot be read, PlanError for models that do not fit together.
    """
    if isinstance(recipe.method, SearchMethod):
        recipe = candidate_recipe(recipe, recipe.method.space(tuple(recipe.models)).start)
    lookup = lookup or Lookup(recipe.folder)
    opened = dict(sources) if sources is not None else open_models(recipe, lookup)
    if isinstance(recipe.method, BundleMethod) and BASE in opened:
        opened = present(opened, [name for name, reference in recipe.models.items() if reference.head is not None])
    if output is None and recipe.output.path is not None:
        output = recipe.path_of(recipe.output.path)
    donor = BASE if BASE in opened else next(iter(recipe.models))
    draft = _Draft(recipe, opened, donor)
    steps = draft.steps()
    shards = _shards(steps, recipe.output.shard_size)
    placed = _place(steps, shards)
    warnings = (*lookup.warnings, *draft.warnings)
    missing = sum(lookup.missing.values())
    others = _other_files(recipe)
    return Plan(recipe, opened, donor, placed, tuple(shards), output, warnings, lookup.origins, missing, others)


def _other_files(recipe: Recipe) -> dict[str, FileStamp]:
    found = {}
    for field, path in recipe.method.files().items():
        with at(field):
            found[field] = FileStamp.of(recipe.path_of(path))
    return found


def open_models(recipe: Recipe, lookup: Lookup) -> dict[str, ModelSource]:
    """Every model of a recipe, the base under `BASE`. Raises SourceError, HubError or PlanError."""
    opened = {}
    references = {**({BASE: recipe.base} if recipe.base else {}), **recipe.models}
    for name, reference in references.items():
        with at("base" if name == BASE else f"model {name!r}"):
            opened[name] = lookup.open(name, reference.source, reference.adapters, reference.select)
            _refuse_quantised(opened[name])
    return opened


def _refuse_quantised(source: ModelSource) -> None:
    config = read_config(source.folder)
    if config.get("quantization_config"):
        raise PlanError(
            "its weights are quantised (config.json has quantization_config), so arithmetic on them is meaningless",
            str(source.folder),
            "dequantise the model first, and save it in bfloat16",
        )


class _Draft:
    """One planning run: the state that matching tensor names needs."""

    def __init__(self, recipe: Recipe, sources: Mapping[str, ModelSource], donor: str) -> None:
        self.recipe = recipe
        self.sources = sources
        self.donor = donor
        self.warnings: list[str] = []
        self.uses_base = BASE in sources
        self.matched = [False] * len(recipe.overrides)
        self.fitted = isinstance(recipe.method, FittedMethod)
        self.method = _tensor_method(recipe.method)
        self.overridden = [_tensor_method(_overridden(recipe.method, override)) for override in recipe.overrides]

    def steps(self) -> list[Step]:
        names = self._names()
        self._check_missing([name for name, extra in names.items() if not extra])
        layers = structural_depths(names)
        steps = [
            step
            for name, extra in names.items()
            if (step := self._step(name, _depth(layers[name]), extra=extra)) is not None
        ]
        if not steps:
            raise PlanError("the models hold no tensors to merge", "plan", "check the paths of the models")
        _check_surveyed_together([step for step in steps if step.surveyed_together])
        self.warnings += [
            f"override {override.match!r} matches no tensor"
            for override, matched in zip(self.recipe.overrides, self.matched, strict=True)
            if not matched
        ]
        return steps

    def _names(self) -> dict[str, bool]:
        """Output names in the donor's file order; True marks those that the base lacks."""
        leader = self.sources[self.donor]
        names = dict.fromkeys(sorted(leader.specs, key=leader.position), False)
        for model in self.recipe.models:
            source = self.sources[model]
            for name in sorted(source.specs, key=source.position):
                if name not in names:
                    self._check_extra(name, model)
                    names[name] = self.uses_base
        return names

    def _check_extra(self, name: str, model: str) -> None:
        if self.uses_base and self.recipe.check.extra == "error":
            raise PlanError(
                f"tensor {name!r} is in model {model!r} but not in the base", "plan", "set check.extra: keep"
            )

    def _check_missing(self, names: Sequence[str]) -> None:
        if self.recipe.check.missing != "error":
            return
        for model in self.recipe.models:
            missing = [name for name in names if name not in self.sources[model].specs and not self._uses(name)]
            if missing:
                shown = ", ".join(missing[:_MAX_LISTED]) + (", ..." if len(missing) > _MAX_LISTED else "")
                other = "base" if self.uses_base else "another model"
                raise PlanError(
                    f"model {model!r} lacks {len(missing)} tensors that {other} has: {shown}",
                    f"model {model!r}",
                    "set check.missing: base or skip, or copy them with an override `use`"
                    if self.uses_base
                    else "set check.missing: skip, or copy them with an override `use`",
                )

    def _override(self, name: str) -> int | None:
        for index, override in enumerate(self.recipe.overrides):
            if fnmatchcase(name, override.match):
                return index
        return None

    def _uses(self, name: str) -> bool:
        index = self._override(name)
        return index is not None and self.recipe.overrides[index].use is not None

    def _step(self, name: str, depth: float, *, extra: bool) -> Step | None:
        index = self._override(name)
        override = None if index is None else self.recipe.overrides[index]
        if index is not None:
            self.matched[index] = True
        holders = [model for model in self.recipe.models if name in self.sources[model].specs]
        if override is not None and override.use is not None:
            return self._copy(name, override.use, depth)
        if extra:
            return self._copy(name, holders[0], depth) if self.recipe.check.extra == "keep" else None
        leader = self.donor if name in self.sources[self.donor].specs else holders[0]
        spec = self.sources[leader].specs[name]
        if not spec.dtype.is_float:
            self._check_none_is_float(spec, leader, holders)
        if not spec.dtype.is_float or spec.num_elements == 0:
            return self._copy(name, leader, depth)
        models = [model for model in self.recipe.models if model in holders or self.recipe.check.missing == "base"]
        method = self.method if index is None else self.overridden[index]
        if len(models) < method.min_models:
            return self._copy(name, leader, depth)
        sources = tuple(model if model in holders else BASE for model in models)
        self._check_alike(spec, leader, sources)
        params = method.params(depth, models)
        if problem := method.problem(params):
            raise PlanError(problem, f"{method.method_name()}: {name}", "change the numbers for this tensor")
        uses_base = self.uses_base and method.needs_base != "unused"
        written = TensorSpec(name, self._dtype_out(self.sources[leader].stored_as(name)), spec.shape)
        return Step(0, written, 0, leader, depth, method, params, tuple(models), sources, uses_base, self.fitted)

    def _copy(self, name: str, donor: str, depth: float) -> Step:
        spec = self.sources[donor].specs.get(name)
        if spec is None:
            raise PlanError(f"override `use: {donor}`: that model has no such tensor", name, "use another model")
        dtype = self._dtype_out(self.sources[donor].stored_as(name)) if spec.dtype.is_float else spec.dtype
        return Step(0, TensorSpec(name, dtype, spec.shape), 0, donor, depth)

    def _dtype_out(self, stored: DType) -> DType:
        wanted = self.recipe.output.dtype
        return stored if wanted == "source" else BY_TORCH_NAME[wanted]

    def _check_alike(self, spec: TensorSpec, leader: str, models: Sequence[str]) -> None:
        for model in models:
            other = self.sources[model].specs[spec.name]
            if other.shape != spec.shape:
                raise PlanError(
                    f"shape {list(other.shape)} in {_label(model)}, {list(spec.shape)} in {_label(leader)}",
                    spec.name,
                    f"merge models of one size, or copy it: overrides: [{{match: {spec.name!r}, use: {leader}}}]",
                )
            if not other.dtype.is_float:
                raise PlanError(
                    f"dtype {other.dtype.name} in {_label(model)}, {spec.dtype.name} in {_label(leader)}",
                    spec.name,
                    f"copy it: overrides: [{{match: {spec.name!r}, use: {leader}}}]",
                )

    def _check_none_is_float(self, spec: TensorSpec, leader: str, models: Sequence[str]) -> None:
        """Whole numbers are copied, but not where another model has learnt values in their place."""
        for model in models:
            other = self.sources[model].specs[spec.name]
            if other.dtype.is_float:
                raise PlanError(
                    f"dtype {spec.dtype.name} in {_label(leader)}, {other.dtype.name} in {_label(model)}",
                    spec.name,
                    f"copy it: overrides: [{{match: {spec.name!r}, use: {model}}}]",
                )


def _check_surveyed_together(steps: Sequence[Step]) -> None:
    """A survey of the whole model has one set of models and one set of numbers."""
    for step in steps[1:]:
        assert step.method is not None
        first = steps[0]
        name = step.method.method_name()
        if step.models != first.models:
            raise PlanError(
                f"{name} looks at the whole model at once, but models {', '.join(step.models)} have this tensor,"
                f" and {', '.join(first.models)} have {first.spec.name}",
                step.spec.name,
                "set check.missing: base, or merge each tensor for itself (scope: tensor)",
            )
        if _survey(step) != _survey(first):
            raise PlanError(
                f"{name} looks at the whole model at once, but its numbers differ from those of {first.spec.name}",
                step.spec.name,
                "use the same numbers for all tensors, or merge each tensor for itself (scope: tensor)",
            )


def _survey(step: Step) -> object:
    return None if step.method is None else step.method.survey(step.params, 1 << 40, bits=32)


def _depth(layer: tuple[int, int] | None) -> float:
    """Depth in [0, 1]; tensors outside the layers sit with the first layer (an override can say otherwise)."""
    return layer[0] / (layer[1] - 1) if layer is not None and layer[1] > 1 else 0.0


def _label(model: str) -> str:
    return "the base" if model == BASE else f"model {model!r}"


def _overridden(method: Method, override: Override) -> Method:
    return method.model_copy(update=override.settings())


def _tensor_method(method: Method) -> TensorMethod:
    """The method that merges tensors: the method itself, or the inner method of one that sees whole models."""
    found = method.inner() if isinstance(method, FittedMethod | BundleMethod) else method
    assert isinstance(found, TensorMethod)
    return found


def _shards(steps: Sequence[Step], limit: int) -> list[Shard]:
    groups = list(_deal(steps, limit))
    named = [
        "model.safetensors" if len(groups) == 1 else f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        for index in range(1, len(groups) + 1)
    ]
    return [Shard(name, *lay_out(group, {"format": "pt"})) for name, group in zip(named, groups, strict=True)]


def _deal(steps: Sequence[Step], limit: int) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one gets a file of its own."""
    group: list[TensorSpec] = []
    size = 0
    for step in steps:
        if group and size + step.spec.num_bytes > limit:
            yield group
            group, size = [], 0
        group.append(step.spec)
        size += step.spec.num_bytes
    yield group


def _place(steps: Sequence[Step], shards: Sequence[Shard]) -> tuple[Step, ...]:
    shard_of = {name: index for index, shard in enumerate(shards) for name in shard.header.slots}
    return tuple(replace(step, index=index, shard=shard_of[step.spec.name]) for index, step in enumerate(steps))
