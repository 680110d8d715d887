"""The steps of a plan: for every output tensor, which models take part, copy or merge, and the numbers at its depth."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mergetool.arch.depth import structural_depths
from mergetool.checkpoints.family import Family
from mergetool.checkpoints.islands import Islands
from mergetool.errors import PlanError
from mergetool.methods.base import BundleMethod, FittedMethod, Method, TensorMethod
from mergetool.planning.graph import BASE, Step
from mergetool.planning.parents import check_missing, label, listed
from mergetool.recipe.schema import Override, Recipe
from mergetool.tensors.dtypes import BY_TORCH_NAME, DType
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config


class Draft:
    """One planning run: the state that matching tensor names needs."""

    def __init__(self, recipe: Recipe, family: Family, template: str) -> None:
        self.recipe = recipe
        self.sources = family.sources
        self.twins = family.twins
        self.islands = {model: Islands(source) for model, source in family.sources.items()}
        self.template = template
        self.warnings: list[str] = []
        self.extras: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self.types = {name: read_config(source.folder).get("model_type") for name, source in self.sources.items()}
        self.foreign: dict[str, list[str]] = {}
        self.uses_base = BASE in self.sources
        self.matched = [False] * len(recipe.overrides)
        self.fitted = isinstance(recipe.method, FittedMethod)
        self.method = _tensor_method(recipe.method)
        self.overridden = [_tensor_method(_overridden(recipe.method, override)) for override in recipe.overrides]

    def steps(self) -> list[Step]:
        names = self._names()
        check_missing(self.recipe, self.sources, [name for name, extra in names.items() if not extra], self._uses)
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
            f"{len(names)} tensors of model {model!r} are left out, since the base is another network that lacks them: "
            f"{listed(names)}; check.extra: keep copies them"
            for model, names in self.foreign.items()
        ]
        self.warnings += [
            f"{len(names)} tensors that the base lacks are copied from model {first!r}, though "
            f"{', '.join(map(repr, others))} have them, too: {listed(names)}; an override `use` takes another's"
            for (first, others), names in self.extras.items()
            if others
        ]
        self.warnings += [
            f"override {override.match!r} matches no tensor{self._hint(override.match)}"
            for override, matched in zip(self.recipe.overrides, self.matched, strict=True)
            if not matched
        ]
        return steps

    def _hint(self, match: str) -> str:
        """What to match instead, where an override means a second name of a tensor."""
        found = next((name for name in self.twins if fnmatchcase(name, match)), None)
        return "" if found is None else f" but {found}, which is {self.twins[found]} under another name: match that"

    def _names(self) -> dict[str, bool]:
        """Output names in the template's file order; True marks those that the base lacks."""
        leader = self.sources[self.template]
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

    def _override(self, name: str) -> int | None:
        """The place of the first override that fits a tensor. A second name of a tensor is treated as that tensor."""
        name = self.twins.get(name, name)
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
            return self._extra(name, holders, depth)
        leader = self.template if name in self.sources[self.template].specs else holders[0]
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
        return self._merge(spec, leader, depth, method, models, sources)

    def _merge(
        self,
        spec: TensorSpec,
        leader: str,
        depth: float,
        method: TensorMethod,
        models: Sequence[str],
        sources: tuple[str, ...],
    ) -> Step:
        """A tensor that a method makes of those that stand in for these models."""
        name = spec.name
        params = method.params(depth, models)
        if problem := method.problem(params):
            raise PlanError(problem, f"{method.method_name()}: {name}", "change the numbers for this tensor")
        uses_base = self.uses_base and method.needs_base != "unused"
        written = TensorSpec(name, self._dtype_out(leader, name), spec.shape)
        return Step(
            0,
            written,
            0,
            leader,
            depth,
            method,
            params,
            tuple(models),
            sources,
            base=uses_base,
            twin=self.twins.get(name),
            whole=self.fitted,
        )

    def _extra(self, name: str, holders: Sequence[str], depth: float) -> Step | None:
        """A tensor that the base lacks."""
        if self.recipe.check.extra != "keep":
            return None
        if "extra" not in self.recipe.check.model_fields_set and self._is_of_another_network(holders[0]):
            self.foreign.setdefault(holders[0], []).append(name)
            return None
        self.extras.setdefault((holders[0], tuple(holders[1:])), []).append(name)
        return self._copy(name, holders[0], depth)

    def _is_of_another_network(self, model: str) -> bool:
        """Whether config.json calls a model another type than the template: what only one has is no part of both."""
        mine, theirs = self.types[model], self.types[self.template]
        return bool(mine and theirs and mine != theirs)

    def _copy(self, name: str, template: str, depth: float) -> Step:
        spec = self.sources[template].specs.get(name)
        if spec is None:
            raise PlanError(f"override `use: {template}`: that model has no such tensor", name, "use another model")
        dtype = self._dtype_out(template, name) if spec.dtype.is_float else spec.dtype
        return Step(0, TensorSpec(name, dtype, spec.shape), 0, template, depth)

    def _dtype_out(self, model: str, name: str) -> DType:
        """The storage dtype of a floating-point tensor that is written as `model` has it, or as was asked for."""
        stored, output = self.sources[model].stored_as(name), self.recipe.output
        if output.dtype == "source":
            return stored
        wanted = BY_TORCH_NAME[output.dtype]
        return stored if wanted.bits == 16 and output.keep_float32 and name in self.islands[model] else wanted

    def _check_alike(self, spec: TensorSpec, leader: str, models: Sequence[str]) -> None:
        for model in models:
            other = self.sources[model].specs[spec.name]
            if other.shape != spec.shape:
                raise PlanError(
                    f"shape {list(other.shape)} in {label(model)}, {list(spec.shape)} in {label(leader)}",
                    spec.name,
                    f"merge models of one size, or copy it: overrides: [{{match: {spec.name!r}, use: {leader}}}]",
                )
            if not other.dtype.is_float:
                raise PlanError(
                    f"dtype {other.dtype.name} in {label(model)}, {spec.dtype.name} in {label(leader)}",
                    spec.name,
                    f"copy it: overrides: [{{match: {spec.name!r}, use: {leader}}}]",
                )

    def _check_none_is_float(self, spec: TensorSpec, leader: str, models: Sequence[str]) -> None:
        """Whole numbers are copied, but not where another model has learnt values in their place."""
        for model in models:
            other = self.sources[model].specs[spec.name]
            if other.dtype.is_float:
                raise PlanError(
                    f"dtype {spec.dtype.name} in {label(leader)}, {other.dtype.name} in {label(model)}",
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


def _overridden(method: Method, override: Override) -> Method:
    return method.model_copy(update=override.settings())


def _tensor_method(method: Method) -> TensorMethod:
    """The method that merges tensors: the method itself, or the inner method of one that sees whole models."""
    found = method.inner() if isinstance(method, FittedMethod | BundleMethod) else method
    assert isinstance(found, TensorMethod)
    return found
