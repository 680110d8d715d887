"""How well a bundle answers rows whose tasks are known, and perhaps their classes.

    mergetool route out/bundle --input rows.jsonl --marks        {"text": "...", "task": "reviews", "label": "good"}

Right is a row whose task's head answered, strictly right one whose class is right, too. A row that was refused is not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.bundle.rows import place_of
from mergetool.errors import SourceError
from mergetool.search.interval import of_mean


@dataclass(frozen=True)
class Marks:
    """What became of all rows."""

    tasks: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Rows of each task (one after the other) by the task that answered."""
    strict: Mapping[str, int]
    """Of each task whose rows all tell their classes: how many are strictly right."""
    refused: tuple[int, ...] = ()
    """Rows of each task that no task answered, where there are any."""

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Shares of every task that has rows, and of all rows together, with intervals of 95 %."""
        left = self.refused or (0,) * len(self.tasks)
        asked = [(at, sum(counts) + left[at]) for at, counts in enumerate(self.confusion) if sum(counts) + left[at]]
        right = sum(self.confusion[at][at] for at, _ in asked)
        known = sum(self.strict.values()) if len(self.strict) == len(asked) else None
        each = [_figures(self.tasks[at], self.confusion[at][at], n, self.strict.get(self.tasks[at])) for at, n in asked]
        return [*each, _figures("all", right, sum(n for _, n in asked), known)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        told = {"tasks": self.tasks, "confusion": self.confusion, "figures": self.figures}
        return told | ({"refused": self.refused} if self.refused else {})


def _figures(task: str, right: int, rows: int, strict: int | None) -> dict[str, Any]:
    told: dict[str, Any] = {"task": task, "rows": rows}
    for name, count in (("right", right), ("strict", strict)):
        low, high = (None, None) if count is None else of_mean(np.repeat([1.0, 0.0], [count, rows - count]))
        told |= {name: None if count is None else count / rows, f"{name}_low": low, f"{name}_high": high}
    return told


def check_tasks_of(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise SourceError for the first row that does not name one of the tasks."""
    for number, row in enumerate(rows, 1):
        if row.get("task") not in names:
            what = f"field `task` is {row['task']!r}" if "task" in row else "has no field `task`"
            raise SourceError(what, place_of(row, number), f"name one of the tasks {', '.join(names)} in every row")


def strictly_right(row: Mapping[str, Any], answer: Mapping[str, Any]) -> bool | None:
    """Whether task and class are right; None where the row, or the head that answered, tells no class."""
    if "label" not in row or ("class" not in answer and answer["task"] is not None):
        return None
    return row["task"] == answer["task"] and row["label"] in (answer["class"], answer["label"])


def marks(names: Sequence[str], rows: Sequence[dict[str, Any]], answered: Iterable[Mapping[str, Any]]) -> Marks:
    """Mark the answers to rows that each name their `task`. Raises SourceError for a row that does not."""
    check_tasks_of(rows, names)
    confusion, refused = [[0] * len(names) for _ in names], [0] * len(names)
    strict: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answered, strict=True):
        task = row["task"]
        if answer["task"] is None:
            refused[names.index(task)] += 1
        else:
            confusion[names.index(task)][names.index(answer["task"])] += 1
        if (told := strictly_right(row, answer)) is not None:
            strict.setdefault(task, []).append(told)
    rows_of = {name: sum(confusion[at]) + refused[at] for at, name in enumerate(names)}
    whole = {task: sum(told) for task, told in strict.items() if len(told) == rows_of[task]}
    return Marks(tuple(names), tuple(map(tuple, confusion)), whole, tuple(refused) if any(refused) else ())
