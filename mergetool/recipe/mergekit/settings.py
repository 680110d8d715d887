"""The settings of one part of a mergekit recipe as fields of our method: values, and overrides where filters decide."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.recipe.document import Place
from mergetool.recipe.mergekit.counterparts import Counterpart
from mergetool.recipe.mergekit.filters import Branch, Case, cases, globs
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.limits import ByModel, within_limits
from mergetool.recipe.mergekit.parameters import Scope, branches_of
from mergetool.recipe.mergekit.renumbered import Renumbered
from mergetool.recipe.mergekit.roster import SliceModels

Mark = Callable[[Place, Place], None]
"""Notes that our place comes from a place of the file."""


@dataclass(frozen=True)
class MethodSettings:
    """Fields of our method, and entries of `overrides` that say all that differs."""

    values: Mapping[str, Any]
    overrides: Sequence[Mapping[str, Any]]

    @property
    def along_depth(self) -> bool:
        """Whether anything changes from layer to layer."""
        return any(has_gradient(value) for each in (self.values, *self.overrides) for value in each.values())


def has_gradient(value: Any) -> bool:
    """Whether a value, or that of one model, is given along depth."""
    return isinstance(value, dict) and ("gradient" in value or any(map(has_gradient, value.values())))


def _default(fields: Mapping[str, Any], name: str) -> Any:
    """The default of a field; the counterpart makes something of a name that is none."""
    return fields[name].default if name in fields else None


def plain(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Fields as a recipe with these models has them."""
    return {key: value.plain(names) if isinstance(value, ByModel) else value for key, value in values.items()}


class SettingsReader:
    """Reads settings for one method; what is wrong or idle goes to `findings`."""

    def __init__(self, findings: Findings, mergekit_name: str, target: Counterpart, mark: Mark) -> None:
        self.findings = findings
        self.name = mergekit_name
        self.target = target
        self.mark = mark
        self.known = [*target.parameters, *target.without_effect]

    def read(
        self,
        models: Mapping[str, Scope],
        shared: Sequence[Scope],
        places: Sequence[Place],
        numbers: Mapping[str, Renumbered],
    ) -> MethodSettings:
        """The settings of models by our names, under the shared scopes, nearest first.

        `places` are ours where fields may come to stand; `numbers` tells what becomes of each model's layers.
        """
        cells = dict(self._cells(models, shared, numbers))
        try:
            *filtered, rest = cases(cells)
        except ValueError as error:
            raise self.findings.stop(("parameters",), str(error), "use the same filters for every model") from None
        varying = {name for (name, _), branches in cells.items() if len(branches) > 1}
        held = self._settled(rest, places)
        overrides: list[dict[str, Any]] = []
        matched = [(glob, each) for each in filtered for glob in globs(each.texts)]
        for glob, fallen in matched:
            own = self._settled(fallen, [(*_holder(place), "overrides", len(overrides)) for place in places])
            told = {key: value for key, value in own.items() if key in varying or value != held.get(key)}
            overrides.append({"match": glob, **(told or own)})  # it hides later ones even if it changes nothing
        return MethodSettings(held, overrides)

    def _settled(self, case: Case, places: Sequence[Place]) -> dict[str, Any]:
        """Our fields in one case, as our method takes them."""
        return within_limits(self.target.settle(self._values(case, places)), self.target.method)

    def _cells(
        self, models: Mapping[str, Scope], shared: Sequence[Scope], numbers: Mapping[str, Renumbered]
    ) -> Iterator[tuple[tuple[str, str | None], list[Branch]]]:
        fields = registry()[self.target.method].model_fields
        for key, parameter in self.target.parameters.items():
            for name, own in models.items() if parameter.per_model else [(None, None)]:
                scopes = [*([own] if own else []), *shared]
                try:
                    branches = branches_of(self.findings, key, parameter, scopes)
                except RecipeError as error:
                    self.findings.problems += [self._with_idle(each, scopes) for each in error.problems]
                    continue
                if name is not None and name in numbers:
                    branches = list(numbers[name].branches(branches))
                if any(branch.place for branch in branches) or branches[-1].value != _default(fields, parameter.field):
                    yield (parameter.field, name), branches

    def _with_idle(self, problem: RecipeError, scopes: Sequence[Scope]) -> RecipeError:
        """A problem that names parameters which have no effect: perhaps another method was meant."""
        idle = dict.fromkeys(key for scope in scopes for key in scope.parameters if key not in self.known)
        more = f"; mergekit's {self.name} has no parameter {', '.join(map(str, idle))}" if idle else ""
        return RecipeError(problem.what, problem.where, problem.fix + more)

    def _values(self, case: Case, places: Sequence[Place]) -> dict[str, Any]:
        """Our fields in one case."""
        numbers = registry()[self.target.method].schedulables()
        out: dict[str, Any] = {}
        for (name, model), branch in case.branches.items():
            for place in places:
                self.mark((*place, name), branch.place)
                self.mark((*place, name, str(model)), branch.place)
            if model is not None and name in numbers and numbers[name].per_model:
                out.setdefault(name, ByModel())[model] = branch.value
            else:
                out[name] = branch.value
        return out

    def tell_idle(self, group: SliceModels) -> None:
        """Tell of parameters of models that mergekit's method does not have, or not there."""
        own = [key for key, parameter in self.target.parameters.items() if parameter.per_model]
        for source in group.merged:
            for key in source.own.parameters:
                if key in self.target.parameters and key not in own:
                    why = f"{key} is one number for all models; write it under `parameters` of the recipe"
                    self.findings.warn((*source.own.place, key), f"it has no effect here: {why}")
        self.tell_idle_of_all([source.own for source in group.merged])
        if group.ancestor is not None:
            own_scope = group.ancestor.own
            self.findings.idle(own_scope.parameters, own_scope.place, "the base_model takes no parameters")

    def tell_idle_of_all(self, scopes: Sequence[Scope]) -> None:
        """Tell of parameters that mergekit's method does not have at all."""
        for place, scope in {scope.place: scope for scope in scopes}.items():
            unknown = [key for key in scope.parameters if key not in self.known]
            self.findings.idle(unknown, place, f"mergekit's {self.name} has no such parameter", self.known)


def _holder(place: Place) -> Place:
    """Where `overrides` stand beside the fields: in `merge` among them, in a slice beside `set`."""
    return place[:-1] if place[-1] == "set" else place
