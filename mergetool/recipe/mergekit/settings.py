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
from mergetool.recipe.mergekit.parameters import Scope, branches_of

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
        return any(_has_gradient(value) for each in (self.values, *self.overrides) for value in each.values())


def _default(fields: Mapping[str, Any], name: str) -> Any:
    return fields[name].default if name in fields else None  # else it is settled by the counterpart


def _has_gradient(value: Any) -> bool:
    return isinstance(value, dict) and ("gradient" in value or any(map(_has_gradient, value.values())))


class SettingsReader:
    """Reads settings for one method; what is wrong or idle goes to `findings`."""

    def __init__(self, findings: Findings, mergekit_name: str, target: Counterpart, mark: Mark) -> None:
        self.findings = findings
        self.name = mergekit_name
        self.target = target
        self.mark = mark

    def read(self, models: Mapping[str, Scope], shared: Sequence[Scope], place: Place) -> MethodSettings:
        """The settings of models by our names, under the shared scopes, nearest first; `place` is ours for them."""
        cells = dict(self._cells(models, shared))
        try:
            *filtered, rest = cases(cells)
        except ValueError as error:
            raise self.findings.stop(("parameters",), str(error), "use the same filters for every model") from None
        varying = {name for (name, _), branches in cells.items() if len(branches) > 1}
        matched = [(glob, case) for case in filtered for glob in globs(case.texts)]
        values = self._values(rest, place)
        overrides = [
            {"match": glob, **self._values(case, (*place, "overrides", index), varying)}
            for index, (glob, case) in enumerate(matched)
        ]
        return MethodSettings(values, overrides)

    def _cells(
        self, models: Mapping[str, Scope], shared: Sequence[Scope]
    ) -> Iterator[tuple[tuple[str, str | None], list[Branch]]]:
        fields = registry()[self.target.method].model_fields
        for key, parameter in self.target.parameters.items():
            for name, own in models.items() if parameter.per_model else [(None, None)]:
                scopes = [*([own] if own else []), *shared]
                try:
                    branches = branches_of(self.findings, key, parameter, scopes)
                except RecipeError as error:
                    self.findings.problems += error.problems
                    continue
                if any(branch.place for branch in branches) or branches[-1].value != _default(fields, parameter.field):
                    yield (parameter.field, name), branches

    def _values(self, case: Case, place: Place, only: set[str] | None = None) -> dict[str, Any]:
        """Our fields in one case: one value for all models where they agree, else one for each."""
        values: dict[str, dict[str | None, Branch]] = {}
        for (name, model), branch in case.branches.items():
            if only is None or name in only:
                values.setdefault(name, {})[model] = branch
        out: dict[str, Any] = {}
        for name, by_model in values.items():
            first, *others = by_model.values()
            self.mark((*place, name), first.place)
            if all(other.value == first.value for other in others):
                out[name] = first.value
                continue
            out[name] = {model: branch.value for model, branch in by_model.items()}
            for model, branch in by_model.items():
                self.mark((*place, name, str(model)), branch.place)
        return out

    def tell_idle(self, models: Sequence[Scope], bases: Sequence[Scope], shared: Sequence[Scope]) -> None:
        """Tell of parameters that mergekit's method does not have, or not there."""
        known = [*self.target.parameters, *self.target.without_effect]
        own = [key for key, parameter in self.target.parameters.items() if parameter.per_model]
        for scope in [*models, *shared]:
            unknown = [key for key in scope.parameters if key not in known]
            self.findings.idle(unknown, scope.place, f"mergekit's {self.name} has no such parameter", known)
        for scope in models:
            for key in scope.parameters:
                if key in self.target.parameters and key not in own:
                    why = f"{key} is one number for all models; write it under `parameters` of the recipe"
                    self.findings.warn((*scope.place, key), f"it has no effect here: {why}")
        for scope in bases:
            self.findings.idle(scope.parameters, scope.place, "the base_model takes no parameters")
