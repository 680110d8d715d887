"""Answers kept in the journals of searches: to compare models item by item, and to try estimators on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.search.interval import of_difference

Who = str | tuple[Any, ...]
"""A model by name, a candidate by its values."""


@dataclass(frozen=True)
class Matrix:
    """Answers (models, search items) by task: the base, the models, then merges."""

    answers: Mapping[str, np.ndarray]
    num_known: int
    """How many of the rows are no merges."""


def read_matrix(full: Path, calibrated: Path) -> Matrix:
    """Answers in the journals of a search with full evaluation (merges) and of one that calibrated (base, models)."""
    known = [scores for who, scores in _answers(calibrated, "calibration") if isinstance(who, str)]
    merges = [scores for who, scores in _answers(full, "search") if not isinstance(who, str)]
    rows = [*known, *merges]
    return Matrix({task: np.array([row[task] for row in rows]) for task in rows[0]}, len(known))


def compared(folder: Path, full: Path) -> dict[str, Any]:
    """A search's winner on the report items: its score, and how far it is from others that answered the same items.

    Every number but the counts is a pair: a mean, and half the width of its 95 % interval (paired by item).
    """
    report, exact = (json.loads((path / "report.json").read_text()) for path in (folder, full))
    scores = on_report(folder)
    winner = scores[tuple(report["winner"]["values"])]
    parents = {who: found for who, found in scores.items() if isinstance(who, str) and who != "base"}
    others = {
        "best_parent": max(parents.values(), key=np.mean),
        "uniform": [found for who, found in scores.items() if not isinstance(who, str)][-1],
        "full": on_report(full)[tuple(exact["winner"]["values"])],
    }
    return {
        "report": _apart(winner, np.zeros_like(winner)),
        **{name: _apart(winner, found) for name, found in others.items()},
        "items": report["spent"]["searching"],
        "reduction": exact["spent"]["searching"] / report["spent"]["searching"],
    }


def on_report(folder: Path) -> dict[Who, np.ndarray]:
    """Scores (items of all tasks in a row) of everybody who answered the report items of a search."""
    return {who: np.concatenate(list(scores.values())) for who, scores in _answers(folder, "report")}


def _apart(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    low, high = of_difference(ours, theirs)
    return (low + high) / 2, (high - low) / 2


def _answers(folder: Path, stage: str) -> Iterator[tuple[Who, dict[str, np.ndarray]]]:
    """Who answered what in one stage of a search: scores of all items of the stage's pool, by task."""
    header, *lines = (json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines())
    pools = header["pools"]["report" if stage == "report" else "search"]
    for line in lines:
        asked, who, items = line.get("question", ("", "", {}))
        if asked == stage and "scores" in line:
            assert items == pools
            yield (
                who if isinstance(who, str) else tuple(who),
                {task: np.array(line["scores"][task][0], dtype=float) for task in pools},
            )
