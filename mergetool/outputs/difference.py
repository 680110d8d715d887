"""What `mergetool diff` finds, as objects, rows and JSON."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mergetool.arch.depth import role
from mergetool.kernels.differences import Sums, cosine, ratio
from mergetool.units import several

IDENTICAL, ROUNDED, CHANGED = "identical", "rounded", "changed"


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of both."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """As stored in the first, the second, and the base, if there is one."""
    sums: Sums
    rounded: bool = False
    """Whether one is the other rounded to its dtype."""

    @property
    def state(self) -> str:
        """In a word."""
        if self.sums.changed == 0:
            return IDENTICAL
        return ROUNDED if self.rounded else CHANGED

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        stored = dict(zip(("dtype_a", "dtype_b", "dtype_base"), self.dtypes, strict=False))
        head = {"tensor": self.name, "state": self.state, "shape": list(self.shape), **stored}
        return head | measures(self.sums, based=len(self.dtypes) > 2)


@dataclass(frozen=True)
class FileDifference:
    """A setting beside the weights."""

    file: str
    key: str
    a: Any
    b: Any

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {"file": self.file, "key": self.key, "a": self.a, "b": self.b}


def measures(sums: Sums, *, based: bool) -> dict[str, Any]:
    """The figures of some tensors; with a base, those of both task vectors, too."""
    figures = {
        "relative": sums.relative,
        "cosine": sums.cosine,
        "share_changed": sums.changed / max(1, sums.entries),
        "max": sums.largest,
    }
    if based:
        figures |= {
            "change_a": ratio(sums.da2, sums.base2),
            "change_b": ratio(sums.db2, sums.base2),
            "cosine_of_changes": cosine(sums.dadb, sums.da2, sums.db2),
            "share_opposed": sums.opposed / max(1, sums.entries),
        }
    return figures


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints (or adapters, or locks), compared."""

    a: str
    b: str
    base: str | None = None
    tensors: tuple[TensorDifference, ...] = ()
    """Most changed first."""
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """Tensors of two shapes: name, shape in the first, in the second."""
    files: tuple[FileDifference, ...] = ()
    """Config, tokenizer, chat template; or all that differs in two locks."""
    remarks: tuple[str, ...] = ()
    total: Sums = field(default_factory=Sums)

    @property
    def identical(self) -> bool:
        """Whether nothing differs, in the weights and beside them."""
        return not self.files and self.identical_weights

    @property
    def identical_weights(self) -> bool:
        """Whether both have the same tensors, and these the same numbers."""
        parts = (self.only_a, self.only_b, self.reshaped)
        return not any(parts) and all(each.state == IDENTICAL for each in self.tensors)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for every tensor, most changed first: `pandas.DataFrame(difference.rows)`."""
        return [each.row() for each in self.tensors]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """A row for every layer, bottom to top, and one for what is outside them."""
        return self._groups(lambda name: layer_and_role(name)[0])

    @property
    def roles(self) -> list[dict[str, Any]]:
        """A row for all tensors of a role (the same name in every layer), most changed first."""
        rows = self._groups(lambda name: layer_and_role(name)[1])
        return sorted(rows, key=lambda row: -row["relative"])

    def _groups(self, key: Callable[[str], str]) -> list[dict[str, Any]]:
        groups: dict[str, list[TensorDifference]] = {}
        for each in sorted(self.tensors, key=lambda each: _natural(each.name)):
            groups.setdefault(key(each.name), []).append(each)
        based = self.base is not None
        return [
            {"name": name, "tensors": len(own), "changed": sum(each.state != IDENTICAL for each in own)}
            | measures(added(own), based=based)
            for name, own in groups.items()
        ]

    def summary(self) -> str:
        """One line for people."""
        if self.identical:
            return (
                f"identical: {several(len(self.tensors), 'tensor')}, and what lies beside them"
                if self.tensors
                else "identical"
            )
        told = [f"{several(len(self.files), 'other setting')}"] if self.files else []
        if self.only_a or self.only_b:
            told.insert(
                0, f"{several(len(self.only_a), 'tensor')} only in the first, {len(self.only_b)} only in the second"
            )
        if self.reshaped:
            told.insert(0, f"{several(len(self.reshaped), 'tensor')} of other shapes")
        if self.tensors:
            told.insert(0, self._states())
        return "; ".join(told)

    def _states(self) -> str:
        counts = {state: sum(each.state == state for each in self.tensors) for state in (CHANGED, ROUNDED, IDENTICAL)}
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        if not counts[CHANGED] and not counts[ROUNDED]:
            return f"all {several(len(self.tensors), 'tensor')} identical"
        return f"{several(len(self.tensors), 'tensor')}: {told}; relative difference {self.total.relative:.3g}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data; numbers that are not finite are texts."""
        facts = {
            "a": self.a,
            "b": self.b,
            "base": self.base,
            "identical": self.identical,
            "summary": self.summary(),
            "total": measures(self.total, based=self.base is not None),
            "tensors": self.rows,
            "layers": self.layers,
            "roles": self.roles,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "reshaped": [{"tensor": name, "a": list(one), "b": list(two)} for name, one, two in self.reshaped],
            "files": [each.row() for each in self.files],
            "remarks": list(self.remarks),
        }
        return finite_or_text(facts)

    def to_json(self) -> str:
        """All that was found, as JSON."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, default=str)


def added(tensors: Iterable[TensorDifference]) -> Sums:
    """The sums of some tensors together."""
    return sum((each.sums for each in tensors), Sums())


def most_changed_first(tensors: Iterable[TensorDifference]) -> tuple[TensorDifference, ...]:
    """By relative difference, then by the largest; names in their order where nothing differs."""
    return tuple(sorted(tensors, key=lambda each: (-each.sums.relative, -each.sums.largest, _natural(each.name))))


def layer_and_role(name: str) -> tuple[str, str]:
    """What stands before and with the first number of a name, and what stands behind it: of all experts the same."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if place is None or place + 1 == len(parts):
        return "outside the layers", name
    return ".".join(parts[: place + 1]), role(parts[place + 1 :])


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers by size, not by their first digit."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def finite_or_text(facts: dict[str, Any]) -> dict[str, Any]:
    """The same data as JSON knows it: numbers that are not finite are texts."""
    return {key: _plain(each) for key, each in facts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return finite_or_text(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
