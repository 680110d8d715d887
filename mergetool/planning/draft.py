"""The steps of a plan: for every output tensor, which models take part, copy or merge, and the numbers at its depth."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from mergetool.arch.depth import structural_depths
from mergetool.checkpoints.family import Family
from mergetool.checkpoints.islands import Islands
from mergetool.checkpoints.vocabulary import tokens_of
from mergetool.checkpoints.vocabulary_axes import axes_of
from mergetool.errors import PlanError
from mergetool.layouts.base import Arrangement, Origin
from mergetool.methods.base import TensorMethod
from mergetool.planning.graph import ALIGNED, BASE, ROWS, STORED, Operand, Slot, Step
from mergetool.planning.measures import NOTHING, StatisticSource, key_of_statistic
from mergetool.planning.numbers import Kernels, fits, numbers_of, overridden
from mergetool.planning.operations import Copy, Merge
from mergetool.planning.parents import check_missing, label, listed
from mergetool.planning.words import Rows
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import BY_NAME, BY_TORCH_NAME, DType
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

_SUMS = BY_NAME["F32"]


class Draft:
    """One planning run: the state that deciding about every tensor needs."""

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        template: str,
        rows: Rows,
        measured: Mapping[str, StatisticSource] = NOTHING,
    ) -> None:
        self.recipe = recipe
        self.rows = rows
        self.arrangement: Arrangement = recipe.layout.arrange(family.sources, template, tuple(recipe.models))
        self.sources: dict[str, ModelSource] = {**family.sources, **self.arrangement.sources, **measured}
        self.measured = measured
        self.twins = family.twins
        self.islands = {model: Islands(source) for model, source in self.sources.items()}
        self.template = template
        self.warnings = list(self.arrangement.remarks)
        self.extras: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self.types = {name: read_config(source.folder).get("model_type") for name, source in self.sources.items()}
        self.foreign: dict[str, list[str]] = {}
        self.complex: dict[str, list[str]] = {}
        self.uses_base = BASE in self.sources
        self.overrides = (*recipe.layout_overrides, *recipe.overrides)
        self.matched = [False] * len(self.overrides)
        self.view = ALIGNED if "fit" in recipe.method.stages() else STORED
        self.method = recipe.method.kernel()
        self.kernels = Kernels(recipe.then)
        self.overridden: dict[tuple[int, float | None], TensorMethod] = {}
        self.sets_alone = self.method.max_models == 1 and bool(recipe.method.model_fields_set - {"method"})
        self.narrow: dict[str, DType] = {}

    def steps(self) -> list[Step]:
        """The steps in the order of the arrangement; indices and files are not settled yet."""
        origins = self.arrangement.origins
        self._check_extra(origins)
        check_missing(self.recipe, self.sources, [each for each in origins if not each.extra], self._uses)
        layers = structural_depths([each.name for each in origins])
        steps = [step for each in origins if (step := self._step(each, _depth(layers[each.name]))) is not None]
        if not steps:
            raise PlanError("the models hold no tensors to merge", "plan", "check the paths of the models")
        self._warn()
        return _joined(steps)

    def _warn(self) -> None:
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
            f"{len(names)} tensors of complex numbers are copied from {label(model)}, not merged: {listed(names)}"
            for model, names in self.complex.items()
        ]
        missed = {step.match: step for step in self.recipe.then if step.match not in self.kernels.matched}
        self.warnings += [
            f"then: {step.step_name()}: {match!r} matches no tensor that is merged" for match, step in missed.items()
        ]
        self.warnings += [f"override {match!r} matches no tensor{self._hint(match)}" for match in self._unmatched()]

    def _unmatched(self) -> list[str]:
        """Globs that match nothing, but for those of several parts each of which matches something by itself.

        Such a one says what holds where both would; it need not be that both do.
        """
        matching = {each.match for each, matched in zip(self.overrides, self.matched, strict=True) if matched}
        missed = dict.fromkeys(each.match for each in self.overrides if each.match not in matching)
        return [match for match in missed if not {f"*{part}*" for part in match.split("*") if part} <= matching]

    def _hint(self, match: str) -> str:
        """What to match instead, where an override means a second name of a tensor."""
        meant = next((name for name in self.twins if fnmatchcase(name, match)), None)
        return "" if meant is None else f" but {meant}, which is {self.twins[meant]} under another name: match that"

    def _check_extra(self, origins: Sequence[Origin]) -> None:
        extra = next((each for each in origins if each.extra), None)
        if extra is not None and self.recipe.check.extra == "error":
            what = f"tensor {extra.name!r} is in model {next(iter(extra.tensors))!r} but not in the base"
            raise PlanError(what, "plan", "set check.extra: keep")

    def _override(self, origin: Origin) -> int | None:
        """The place of the first override that fits a tensor. A second name of a tensor is treated as that tensor."""
        name = self.twins.get(origin.name, origin.name)
        own = len(self.recipe.layout_overrides)
        own_first: tuple[int, ...] = (*origin.settings, *range(own, len(self.overrides)))
        for index in own_first:
            if fits(self.overrides[index], name):
                return index
        return None

    def _uses(self, origin: Origin) -> bool:
        index = self._override(origin)
        return index is not None and self.overrides[index].use is not None

    def _step(self, origin: Origin, depth: float) -> Step | None:
        index = self._override(origin)
        override = None if index is None else self.overrides[index]
        if index is not None:
            self.matched[index] = True
        if override is not None and override.use is not None:
            return self._copy(origin, override.use, depth)
        if origin.copy_of is not None and not self.sets_alone:
            return self._copy(origin, origin.copy_of, depth)
        holders = [model for model in origin.models if model in origin.tensors]
        if origin.extra:
            return self._extra(origin, holders, depth)
        leader = self.template if self.template in origin.tensors else holders[0]
        spec = self._spec(origin, leader)
        if not spec.dtype.is_float:
            self._check_none_is_float(origin, leader, holders)
            if spec.dtype.is_complex and {leader, *holders} != {leader}:
                self.complex.setdefault(leader, []).append(origin.name)
        if not spec.dtype.is_float or spec.num_elements == 0:
            return self._copy(origin, leader, depth)
        models = [model for model in origin.models if model in holders or self.recipe.check.missing == "base"]
        method = self._method(index, origin)
        if len(models) < method.min_models:
            return self._copy(origin, leader, depth)
        return self._merge(origin, leader, depth, method, models)

    def _method(self, index: int | None, origin: Origin) -> TensorMethod:
        """What merges a tensor under the override of this place, and the steps that follow."""
        return self.kernels.of(self._merging(index, origin), self.twins.get(origin.name, origin.name))

    def _merging(self, index: int | None, origin: Origin) -> TensorMethod:
        """What merges it before any step. A layout's own overrides run along the part that they are of."""
        if index is None:
            return self.method
        key = index, origin.within if index < len(self.recipe.layout_overrides) else None
        if key not in self.overridden:
            self.overridden[key] = overridden(self.recipe.method, self.overrides[index], key[1])
        return self.overridden[key]

    def _merge(self, origin: Origin, leader: str, depth: float, method: TensorMethod, models: Sequence[str]) -> Step:
        """A tensor that a method makes of those that stand in for these models."""
        sources = [model if model in origin.tensors else BASE for model in models]
        self._check_alike(origin, leader, sources)
        if method.max_models is not None and len(models) > method.max_models:
            what = f"{method.method_name()} takes at most {method.max_models} models, and here are {', '.join(models)}"
            raise PlanError(what, origin.name, "leave some out, or choose another method (mergetool methods)")
        operands = tuple(self._operand(origin, source) for source in sources)
        of = models if method.on_base else sources
        statistics = self._statistics(operands, of) if method.statistic else ()
        method = method if statistics or not method.statistic else method.unmeasured()
        params = numbers_of(method, depth, models, origin.name)
        uses_base = self.uses_base and method.needs_base != "unused"
        written = replace(self._spec(origin, leader), name=origin.name, dtype=self._dtype_made(leader, origin))
        return Step(
            0,
            (Slot(written),),
            Merge(method, params, tuple(models)),
            operands,
            self._operand(origin, BASE) if uses_base else None,
            statistics,
            self._statistic_of_base(origin) if method.statistic_of_base and uses_base else None,
            key=self.twins.get(origin.name, origin.name),
            depth=depth,
        )

    def _statistics(self, operands: Sequence[Operand], models: Sequence[str]) -> tuple[Operand, ...]:
        """What was measured on these models, which operands are of; nothing where one of them has no such statistic."""
        if BASE in models:  # it stands in for a model, and was measured for steps, if at all
            return ()
        keys = [key_of_statistic(model) for model in models]
        known = all(
            operand.view is STORED and key in self.measured and operand.tensor in self.measured[key].specs
            for key, operand in zip(keys, operands, strict=True)
        )
        return tuple(Operand(k, o.tensor) for k, o in zip(keys, operands, strict=True)) if known else ()

    def _statistic_of_base(self, origin: Origin) -> Operand | None:
        """What was measured on the base of a tensor, where there is such a statistic."""
        operand, key = self._operand(origin, BASE), key_of_statistic(BASE)
        known = operand.view is STORED and key in self.measured and operand.tensor in self.measured[key].specs
        return Operand(key, operand.tensor) if known else None

    def _extra(self, origin: Origin, holders: Sequence[str], depth: float) -> Step | None:
        """A tensor that the base lacks."""
        if self.recipe.check.extra != "keep":
            return None
        if "extra" not in self.recipe.check.model_fields_set and self._is_of_another_network(holders[0]):
            self.foreign.setdefault(holders[0], []).append(origin.name)
            return None
        self.extras.setdefault((holders[0], tuple(holders[1:])), []).append(origin.name)
        return self._copy(origin, holders[0], depth)

    def _is_of_another_network(self, model: str) -> bool:
        """Whether config.json calls a model another type than the template: what only one has is no part of both."""
        mine, theirs = self.types[model], self.types[self.template]
        return bool(mine and theirs and mine != theirs)

    def _copy(self, origin: Origin, source: str, depth: float) -> Step:
        if source not in origin.tensors:
            what = f"override `use: {source}`: that model has no such tensor"
            raise PlanError(what, origin.name, "use another model")
        spec = self._spec(origin, source)
        dtype = self._dtype_out(source, origin) if spec.dtype.is_float else spec.dtype
        slot = Slot(TensorSpec(origin.name, dtype, spec.shape))
        return Step(
            0,
            (slot,),
            Copy(),
            (self._operand(origin, source),),
            key=self.twins.get(origin.name, origin.name),
            depth=depth,
        )

    def _spec(self, origin: Origin, source: str) -> TensorSpec:
        return self.sources[_holder(origin, source)].specs[origin.tensors[source]]

    def _operand(self, origin: Origin, source: str) -> Operand:
        holder, name = _holder(origin, source), origin.tensors[source]
        gathered = self.view is STORED and name in self.rows and holder in self.rows[name]
        return Operand(holder, name, ROWS if gathered else self.view)

    def _dtype_made(self, model: str, origin: Origin) -> DType:
        """The storage dtype of what is computed: of an intermediate result that of sums, which are rounded later."""
        asked = self._dtype_out(model, origin)
        if not self.recipe.intermediate or "dtype" in self.recipe.output.model_fields_set or asked.bits >= _SUMS.bits:
            return asked
        self.narrow[origin.name] = asked
        return _SUMS

    def _dtype_out(self, model: str, origin: Origin) -> DType:
        """The storage dtype of a floating-point tensor that is written as `model` has it, or as was asked for."""
        name, model = origin.tensors[model], _holder(origin, model)
        stored, output = self.sources[model].stored_as(name), self.recipe.output
        if output.dtype == "source":
            return stored
        wanted = BY_TORCH_NAME[output.dtype]
        return stored if wanted.bits == 16 and output.keep_float32 and name in self.islands[model] else wanted

    def _check_alike(self, origin: Origin, leader: str, models: Sequence[str]) -> None:
        spec = self._spec(origin, leader)
        for model in models:
            other = self._spec(origin, model)
            fix = f"copy it: overrides: [{{match: {origin.name!r}, use: {leader}}}]"
            if other.shape != spec.shape and not self.recipe.method.resizes:
                what = f"shape {list(other.shape)} in {label(model)}, {list(spec.shape)} in {label(leader)}"
                words = self._has_other_words(origin, (leader, model)) and "write tokenizer: {source: union}"
                raise PlanError(what, origin.name, words or f"merge models of one size, or {fix}")
            if not other.dtype.is_float:
                what = f"dtype {other.dtype.name} in {label(model)}, {spec.dtype.name} in {label(leader)}"
                raise PlanError(what, origin.name, fix)

    def _has_other_words(self, origin: Origin, models: tuple[str, str]) -> bool:
        """Whether a tensor is of two sizes because two models have vocabularies of two sizes, which can be read."""
        shapes = [list(self._spec(origin, model).shape) for model in models]
        sources = [self.sources[_holder(origin, model)] for model in models]
        axis, other = (
            axes_of(source).get(origin.tensors[model]) for model, source in zip(models, sources, strict=True)
        )
        if axis is None or axis != other or not all(tokens_of(source.tokenizer_folder) for source in sources):
            return False
        return shapes[0].pop(axis) != shapes[1].pop(axis) and shapes[0] == shapes[1]

    def _check_none_is_float(self, origin: Origin, leader: str, models: Sequence[str]) -> None:
        """Whole numbers are copied, but not where another model has learnt values in their place."""
        spec = self._spec(origin, leader)
        for model in models:
            other = self._spec(origin, model)
            if other.dtype.is_float:
                raise PlanError(
                    f"dtype {spec.dtype.name} in {label(leader)}, {other.dtype.name} in {label(model)}",
                    origin.name,
                    f"copy it: overrides: [{{match: {origin.name!r}, use: {model}}}]",
                )


def _holder(origin: Origin, source: str) -> str:
    """The model that holds what is called a source's: a part of the output may have a base of its own."""
    return origin.base if source == BASE else source


def _depth(layer: tuple[int, int] | None) -> float:
    """Depth in [0, 1]; tensors outside the layers sit with the first layer (an override can say otherwise)."""
    return layer[0] / (layer[1] - 1) if layer is not None and layer[1] > 1 else 0.0


def _joined(steps: Sequence[Step]) -> list[Step]:
    """Second names of a tensor as slots of the step that makes it: it is read and merged once."""
    joined: list[Step] = []
    first: dict[str, int] = {}
    for step in steps:
        place = first.setdefault(step.key, len(joined))
        if place < len(joined) and _same_values(joined[place], step):
            joined[place] = replace(joined[place], slots=(*joined[place].slots, *step.slots))
        else:
            joined.append(step)
    return joined


def _same_values(one: Step, other: Step) -> bool:
    return (
        (one.operation, one.reads, one.depth) == (other.operation, other.reads, other.depth)
        and one.spec.shape == other.spec.shape
        and one.spec.dtype == other.spec.dtype
    )
