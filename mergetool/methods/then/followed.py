"""A method with the steps after it, as one method: planning and running know no other kind."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SerializeAsAny

from mergetool.methods.then import (
    After,
    Factored,
    Granularity,
    Params,
    StatisticsPass,
    Stats,
    TensorGroup,
    TensorMethod,
    titles,
)

if TYPE_CHECKING:
    from torch import Tensor

_COARSENESS: tuple[Granularity, ...] = ("element", "row", "tensor")
_SLICE = 1 << 18
"""Elements that a method gets at once which needs no whole tensor, where a step after it does."""
_OWN = "then "
"""What begins the names of what steps have counted."""


class Followed(TensorMethod):
    """See above. Made while planning; nothing that a recipe can name."""

    inner: SerializeAsAny[TensorMethod]
    steps: tuple[SerializeAsAny[After], ...]

    @property
    def needs_base(self) -> Literal["required", "optional", "unused"]:  # type: ignore[override]
        return "optional" if self.inner.needs_base == "unused" else self.inner.needs_base

    @property
    def buffers(self) -> int:  # type: ignore[override]
        return self.inner.buffers + 1 + max(step.buffers for step in self.steps)

    @property
    def statistic(self) -> str:  # type: ignore[override]
        return self.inner.statistic

    @property
    def statistic_of_base(self) -> str:  # type: ignore[override]
        return next((step.statistic for step in self.steps if step.statistic), self.inner.statistic_of_base)

    @property
    def on_base(self) -> bool:  # type: ignore[override]
        return self.inner.on_base

    @property
    def min_models(self) -> int:  # type: ignore[override]
        return self.inner.min_models

    @property
    def max_models(self) -> int | None:  # type: ignore[override]
        return self.inner.max_models

    @property
    def pass_depends_on(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return None if self._counts else self.inner.pass_depends_on

    @property
    def needs_float64(self) -> bool:
        return self._counts or self.inner.needs_float64

    @property
    def _counts(self) -> bool:
        return any(step.counts for step in self.steps)

    @property
    def _scales(self) -> bool:
        return all(step.scales for step in self.steps)

    def settings_of_passes(self) -> dict[str, Any]:
        own = {"steps": [step.model_dump() for step in self.steps]} if self._counts else {}
        return {**self.inner.settings_of_passes(), **own}

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        grains = [self.inner.granularity_in(name, shape), *(step.granularity_in(name, shape) for step in self.steps)]
        return max(grains, key=_COARSENESS.index)

    @property
    def called(self) -> str:
        return self._and_steps(self.inner.called)

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        return self._and_steps(self.inner.treatment(name, shape))

    def _and_steps(self, first: str) -> str:
        return f"{first}, then {', '.join(step.step_name() for step in self.steps)}"

    def partners(self, name: str) -> tuple[str, ...]:
        return self.inner.partners(name)

    def alone(self) -> TensorMethod:
        return self.inner

    def unmeasured(self) -> TensorMethod:
        return Followed(inner=self.inner.unmeasured(), steps=self.steps)

    def pass_scope(self) -> Literal["tensor", "model"]:
        return self.inner.pass_scope()

    def counts(self, name: str, shape: tuple[int, ...]) -> bool:
        return (self._counts and not self._counts_again) or self.inner.counts(name, shape)

    @property
    def _counts_again(self) -> bool:
        """Whether steps count over each tensor by itself once something is known of the whole model."""
        return self._counts and self.inner.pass_scope() == "model"

    def pass_after(self, found: Stats) -> StatisticsPass | None:
        following = self.following(found, 0) if self._counts_again else found
        return None if isinstance(following, Mapping) else following

    @property
    def by_tensor(self) -> str:  # type: ignore[override]
        return self.inner.by_tensor

    def params(self, depth: float, models: Sequence[str]) -> Params:
        own = {
            f"{self._title(place)}.{key}": number
            for place, step in enumerate(self.steps)
            for key, number in step.numbers(depth).items()
        }
        return Params(**vars(self.inner.params(depth, models)), **own)

    def _title(self, place: int) -> str:
        return list(titles(step.step_name() for step in self.steps))[place]

    def _numbers(self, place: int, p: Params) -> Params:
        begin = f"{self._title(place)}."
        return Params(**{key.removeprefix(begin): each for key, each in vars(p).items() if key.startswith(begin)})

    def problem(self, p: Params) -> str | None:
        return self.inner.problem(p)

    def needs_weights(self) -> str | None:
        if any(step.statistic for step in self.steps):
            return "a step after it runs the base on data"
        if self.inner.in_factors("", (2, 2)) == "halves" and not self._scales:
            return f"{self.steps[0].step_name()} looks at what the matrices come to, which are added up by themselves"
        return self.inner.needs_weights()

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        return self.inner.in_factors(name, shape) if self._scales else "product"

    def _factor(self, p: Params) -> float:
        factor = 1.0
        for place in range(len(self.steps)):
            factor *= float(vars(self._numbers(place, p))["factor"])
        return factor

    def coefficients(self, p: Params) -> tuple[float, ...]:
        return tuple(self._factor(p) * each for each in self.inner.coefficients(p))

    def half_coefficients(self, scales: Sequence[float], p: Params) -> Sequence[tuple[float, float]]:
        return [(self._factor(p) * b, a) for b, a in self.inner.half_coefficients(scales, p)]

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        first = self.inner.statistics_pass(p, num_elements, bits)
        if not self._counts:
            return first
        if first is not None:
            return _PassBefore(self, first, first.one_in, first.joined)
        following = {} if self._counts_again else self.following({}, 0)
        return None if isinstance(following, Mapping) else following

    def following(self, known: Stats, place: int) -> StatisticsPass | Stats:
        """The pass of the next step that counts, from this place on; or what is known, where there is none."""
        left = (index for index, step in enumerate(self.steps) if index >= place and step.counts)
        return next((_PassOfStep(self, known, index) for index in left), known)

    def counted(self, group: TensorGroup, p: Params, known: Stats, place: int) -> "Tensor":
        """What a step counts over a slice."""
        change, _, seen = self._until(group, p, known, place)
        return self.steps[place].count(seen[place], change, group, self._numbers(place, p))

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        if self._scales and self._factor(p) == 1.0:
            return self.inner.merge(group, p, stats)
        change, base, _ = self._until(group, p, stats, len(self.steps))
        return change if base is None else change.add_(base)

    def _until(
        self, group: TensorGroup, p: Params, known: Stats, stop: int
    ) -> "tuple[Tensor, Tensor | None, list[Tensor | None]]":
        """The change before the step of this place, the base, and what all steps up to that one have seen."""
        numbers = [self._numbers(place, p) for place in range(len(self.steps))]
        seen = [self._seen(place, group, numbers[place], known) for place in range(min(stop + 1, len(self.steps)))]
        base = None if group.base is None else group.scratch("then base").copy_(group.base)
        change = self._merged(group, p, {key: each for key, each in known.items() if not key.startswith(_OWN)})
        if base is not None:
            change = change.sub_(base)
        for place, step in enumerate(self.steps[:stop]):
            change = step.apply(change, seen[place], group, numbers[place])
        return change, base, seen

    def _seen(self, place: int, group: TensorGroup, p: Params, known: Stats) -> "Tensor | None":
        import torch

        counted = known.get(f"{_OWN}{place}")
        if counted is None:
            return self.steps[place].look(group, p)
        return torch.tensor(counted, dtype=torch.float64, device=group.models[0].device)

    def sliced(self, group: TensorGroup) -> Iterator[TensorGroup]:
        """A group as the method before the steps sees it: in slices, where only a step must see more."""
        more = group.models[0].dim() != 1 and self.inner.granularity_in(group.name, group.shape) == "element"
        if not more or self.inner.statistic:
            yield group
            return
        models = [model.view(-1) for model in group.models]
        base = None if group.base is None else group.base.view(-1)
        for start in range(0, max(1, len(models[0])), _SLICE):
            part = slice(start, start + _SLICE)
            yield replace(
                group,
                base=None if base is None else base[part],
                models=[model[part] for model in models],
                start=group.start + start,
                new=None,
                kept=None,
            )

    def _merged(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        parts = list(self.sliced(group))
        if len(parts) == 1 and parts[0] is group:
            return self.inner.merge(group, p, stats)
        whole = group.scratch("then merged")
        for part in parts:
            begin = part.start - group.start
            whole.view(-1)[begin : begin + len(part.models[0])] = self.inner.merge(part, p, stats)
        return whole


@dataclass(frozen=True)
class _PassBefore(StatisticsPass):
    """A pass of the method; those of the steps come after it."""

    method: Followed
    before: StatisticsPass
    one_in: int
    joined: bool

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        return self.before.observe((part for group in groups for part in self.method.sliced(group)), p)

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        found = self.before.conclude(total)
        if isinstance(found, Mapping):
            return found if self.method._counts_again else self.method.following(found, 0)
        return _PassBefore(self.method, found, found.one_in, found.joined)


@dataclass(frozen=True)
class _PassOfStep(StatisticsPass):
    """The pass of one step, over what the method and the steps before it make."""

    method: Followed
    known: Stats
    place: int

    def observe(self, groups: Iterable[TensorGroup], p: Params) -> "Tensor":
        total = None
        for group in groups:
            part = self.method.counted(group, p, self.known, self.place).to("cpu")
            total = part if total is None else total + part
        assert total is not None
        return total

    def conclude(self, total: "Tensor") -> StatisticsPass | Stats:
        found = {**self.known, f"{_OWN}{self.place}": tuple(total.tolist())}
        return self.method.following(found, self.place + 1)
