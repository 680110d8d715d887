"""Solves for the size of every space, from config.json and from shapes."""

from collections.abc import Mapping
from math import prod
from typing import Any

from mergetool.arch.bind import Bound, Instance
from mergetool.arch.language import Axis, Term, first_known
from mergetool.errors import PlanError


class Sizes:
    """Solves for the size of every space, remembering which axis told it."""

    def __init__(self, family: str, instances: Mapping[str, Instance], config: Mapping[str, Any]) -> None:
        self.family = family
        self.instances = instances
        self.config = config
        self.known: dict[str, int] = {}
        self.origin: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def solve(self, bound: list[Bound]) -> dict[str, int]:
        """Size of every space. Raises PlanError for one that nothing tells, or an axis that does not divide."""
        for name, instance in self.instances.items():
            if instance.rule.size is not None:
                try:
                    size = first_known(instance.rule.size, {**self.config, **instance.holes})
                except KeyError as error:
                    self.missing[name] = str(error.args[0])
                    continue
                except ValueError as error:
                    raise PlanError(str(error), where=f"architecture {self.family}: space {name!r}") from None
                if size < 1:
                    what = f"the size of {name!r} would be {size}, by config.json ({instance.rule.size})"
                    raise PlanError(what, where=f"architecture {self.family}", fix="correct config.json")
                self._learn(name, size, "config.json")
        axes = [(tensor, axis) for tensor in bound for axis in range(len(tensor.shape))]
        while True:
            before = len(self.known)
            for tensor, axis in axes:
                self._solve_axis(tensor, axis)
            if len(self.known) == before:
                break
        self._check(axes)
        return self.known

    def _learn(self, name: str, size: int, origin: str) -> None:
        self.known[name] = size
        self.origin[name] = origin

    def _solve_axis(self, tensor: Bound, axis: int) -> None:
        segments = tensor.axes[axis]
        terms = [term for segment in segments for term in segment]
        unknown = {term.space for term in terms if term.space is not None and term.space not in self.known}
        if len(unknown) != 1 or any(term.space is None and term.size is None for term in terms):
            return
        name = unknown.pop()
        constant, slope = 0, 0
        for segment in segments:
            rest = prod(self._size(term) for term in segment if term.space != name)
            constant, slope = (
                (constant, slope + rest) if any(term.space == name for term in segment) else (constant + rest, slope)
            )
        left = tensor.shape[axis] - constant
        if left <= 0 or left % slope:
            raise PlanError(
                f"an axis of length {tensor.shape[axis]} cannot hold {self._told(segments)}",
                where=f"architecture {self.family}: {tensor.name}, axis {axis}",
            )
        assert name is not None
        self._learn(name, left // slope, f"{tensor.name}, axis {axis}")

    def _size(self, term: Term) -> int:
        if term.space is not None:
            return self.known[term.space]
        return term.size or 1

    def _told(self, segments: Axis) -> str:
        parts = []
        for term in (term for segment in segments for term in segment):
            if term.space in self.known:
                parts.append(f"{term.space} = {self.known[term.space]} (by {self.origin[term.space]})")
            elif term.space is not None:
                parts.append(f"{term.space} = ?")
        return ", ".join(dict.fromkeys(parts)) or "a fixed number"

    def _check(self, axes: list[tuple[Bound, int]]) -> None:
        for name in self.instances:
            if name not in self.known:
                key = self.missing.get(name)
                raise PlanError(
                    f"shapes do not tell the size of {name!r}" + (f", config.json has no {key!r}" if key else ""),
                    where=f"architecture {self.family}",
                    fix=f"put config.json beside the weights, or write a file with `extends: {self.family}` and"
                    f" `sizes: {{{key or name}: N}}`, and name it under `architecture:`",
                )
        for tensor, axis in axes:
            segments = tensor.axes[axis]
            if any(term.space is None and term.size is None for segment in segments for term in segment):
                continue
            size = sum(prod(self._size(term) for term in segment) for segment in segments)
            if size != tensor.shape[axis]:
                raise PlanError(
                    f"the axis has length {tensor.shape[axis]}, its layout {size}: {self._told(segments)}",
                    where=f"architecture {self.family}: {tensor.name}, axis {axis}",
                )
