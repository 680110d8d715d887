"""What the laws are tried on: every registered method with its defaults, and once more for each choice of an option.

A law is tried on each of these cases (one about runs: by default, and under options that change what a run does). They
come from the fields of the classes, so a new method or option is under the laws without anything being written here.
What a method does not obey, it says itself:

    exempt: ClassVar = {"order": "t counts from the first model to the second"}          under all its options
    exempt: ClassVar = {"independent scope=model": "the threshold is the whole model's"}  under this one
    exempt: ClassVar = {"independent": "...", "independent scope=tensor": None}           under all but this one

An exempt method must really break the law: an exemption that is not needed is an error.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mergetool.api import merge_state_dicts
from mergetool.methods import registry
from mergetool.methods.base import Method, TensorMethod
from mergetool.methods.families.bundle import BundleMethod
from mergetool.methods.families.fitted import FittedMethod
from mergetool.testing.toys import FEW, LESS, MLP, Shapes, State, toy_base, toy_deltas, toy_models, toy_statistics

_VALUES = (0.5, 0.25, 1.0)
"""For settings that differ by model: sums and products stay exact, and all lie in (0, 1]."""
_MERGED: dict[tuple[type[Method], str], State] = {}


@dataclass(frozen=True)
class MethodCase:
    """A method under some settings."""

    kind: type[Method]
    option: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.option}".strip()

    @property
    def method(self) -> str:
        return str(self.kind.method_name())

    @property
    def origin(self) -> tuple[type[Method], str]:
        """The class that brings the option, and the option: the same for methods that have it from one family."""
        key = self.option.partition("=")[0].partition(".")[0]
        owners = [each for each in self.kind.__mro__ if key in vars(each).get("__annotations__", {})]
        return (owners or [self.kind])[-1], self.option

    @property
    def has_base(self) -> bool:
        return self.kind.needs_base != "unused"

    @property
    def names(self) -> str:
        """Models that a merge takes, a letter each: three, if the method can."""
        return "abc"[: self.kind.max_models or 3]

    @property
    def architecture(self) -> dict[str, Any]:
        """What a recipe says about the architecture: something where a method looks at whole models."""
        return {"architecture": "mlp"} if issubclass(self.kind, FittedMethod) else {}

    @property
    def shapes(self) -> Shapes:
        """Of its toy models: fewer where an option is tried."""
        return LESS if self.option else FEW

    def toys(self, names: str | None = None, *, exact: bool = True) -> tuple[State, dict[str, State]]:
        """(base, models by name) for this method: fine-tunes of the base, or networks trained apart."""
        names = names or self.names
        if not self.architecture:
            return toy_models(names, exact=exact, shapes=self.shapes)
        models = {name: toy_base(f"apart {name}", exact=exact, shapes=MLP) for name in names}
        return toy_base(exact=exact, shapes=MLP), models

    def toy_parts(self) -> tuple[State, dict[str, State]]:
        """(base, task vectors by name), exact."""
        return toy_base(shapes=self.shapes), {name: toy_deltas(name, shapes=self.shapes) for name in self.names}

    def with_settings(self, **more: Any) -> "MethodCase":
        return MethodCase(self.kind, self.option, {**self.settings, **more})

    def neutral(self) -> "MethodCase":
        return self.with_settings(**self.kind.neutral)

    def uneven(self) -> "MethodCase":
        """With other numbers than the defaults, and another one for every model wherever that is possible."""
        each = dict(zip(self.names, _VALUES, strict=False))
        return self.with_settings(
            **{k: each if schedulable.per_model else 0.75 for k, schedulable in self.kind.schedulables().items()}
        )

    def statistics(self, models: Mapping[str, State]) -> dict[str, State] | None:
        """What is measured on these models, where the method needs that: made up, another one for each."""
        kind, states = self.kind.statistic, dict(models)
        if self.kind.on_base:
            states["base"] = next(iter(models.values()))
        return {name: toy_statistics(kind, name, state) for name, state in states.items()} if kind else None

    def section(self) -> dict[str, Any]:
        """The `merge` section of a recipe."""
        return {"method": self.method, **self.settings}

    def work(self) -> tuple[object, ...]:
        """What the engine sees of the method: stages, passes over models before merging, what it needs whole."""
        method = self.kind.model_validate(self.settings)
        kernel = method.kernel()
        passes = kernel.statistics_pass(kernel.params(0.0, self.names), prod(FEW["model.embed_tokens.weight"]), 32)
        whole = sorted({str(kernel.granularity_in(name, shape)) for name, shape in FEW.items()})
        return method.stages(), type(passes), kernel.pass_scope(), whole, kernel.partners("a"), kernel.needs_float64

    @cached_property
    def works_in_another_way(self) -> bool:
        """By default, and under options that change which work is done, not only its arithmetic."""
        return not self.option or self.work() != MethodCase(self.kind).work()

    def merged(self) -> State:
        """What these settings make of the exact toys: merged once for all laws that compare with it."""
        key = (self.kind, repr(self.settings))
        if key not in _MERGED:
            if len(_MERGED) > 1:  # those of the case before
                _MERGED.clear()
            _MERGED[key] = self.merge(*self.toys())
        return _MERGED[key]

    def merge(self, base: State, models: Mapping[str, State], **compute: Any) -> State:
        """Merge state dicts (`seed` and `dtype` go to the computation)."""
        given = base if self.has_base else None
        more = {**self.architecture, "statistics": self.statistics(models), **compute}
        return merge_state_dicts(self.section(), models, given, **more)


def choices(kind: type[BaseModel]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, setting) for every choice of an option other than its default; sections are looked into."""
    for key, info in kind.model_fields.items():
        values = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        if info.annotation is bool:
            values = (False, True)
        yield from ((key, value, {key: value}) for value in values if key != "method" and value != info.default)
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and not issubclass(section, Method):
            yield from ((f"{key}.{k}", value, {key: setting}) for k, value, setting in choices(section))


def cases(kind: type[Method]) -> Iterator[MethodCase]:
    """The defaults, then one case for every other choice that needs no second setting beside it."""
    yield MethodCase(kind)
    for key, value, setting in choices(kind):
        try:
            kind.model_validate(setting)
        except ValidationError:
            continue
        yield MethodCase(kind, f"{key}={value if isinstance(value, str) else json.dumps(value)}", setting)


def each_once(tried: Iterable[MethodCase], turn: int = 0) -> list[MethodCase]:
    """Of cases that have one option from one family, one: another one at another turn. No option is left out."""
    alike: dict[object, list[MethodCase]] = {}
    for case in tried:
        alike.setdefault(case.origin, []).append(case)
    return [group[(turn + place) % len(group)] for place, group in enumerate(alike.values())]


def all_cases() -> Iterator[MethodCase]:
    """Cases of all methods whose result is a checkpoint."""
    for kind in registry().values():
        if issubclass(kind, TensorMethod | FittedMethod):
            yield from cases(kind)


def bundle_cases() -> list[MethodCase]:
    """Cases of all methods whose result is a bundle; choices that their routers share are tried under mass alone."""
    every = [case for kind in registry().values() if issubclass(kind, BundleMethod) for case in cases(kind)]
    return [case for case in every if case.method == "mass" or not case.option.startswith("router.")]
