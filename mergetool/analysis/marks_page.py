"""How well a bundle answers rows whose tasks are known, as data and as a page.

mergetool route out/bundle --input rows.jsonl --labels -o marked
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergetool._version import __version__
from mergetool.analysis.written import write_both
from mergetool.bundle.marks import Marks, strictly_right
from mergetool.evaluate.reliability import calibration_error, reliability
from mergetool.pages import Chapter, Column, Facts, Page, Picture, Piece, Table, bars, heat, points, render
from mergetool.pages.cells import share

Row = Mapping[str, Any]
MOST_WRONG = 50
"""Wrong answers that are told, the surest first."""
_MOST_TEXT = 200
_MOST_NUMBERS = 12
"""Tasks up to which the cells of the map hold numbers."""
_MOST_PLACES = 16
"""Tasks up to which the map grows."""
_RIGHT, _STRICT = ("right", "right_low", "right_high"), ("strict", "strict_low", "strict_high")


def write_marks(found: Marks, rows: Sequence[Row], answered: Sequence[Row], folder: Path) -> Path:
    """Write `marks.json` and the page, whose path is returned. Raises OutputError."""
    facts = facts_of_marks(found, rows, answered)
    data = json.dumps(facts, indent=2, ensure_ascii=False)
    return write_both(folder, "marks", data, lambda: page_of_marks(facts))


def facts_of_marks(found: Marks, rows: Sequence[Row], answered: Sequence[Row]) -> dict[str, Any]:
    """Marks, and what the single answers tell: how sure they were, and which were wrong though sure. JSON-able."""
    told = [
        (row["task"] == answer["task"], answer["task_probability"])
        for row, answer in zip(rows, answered, strict=True)
        if answer["task"] is not None  # of one that was refused nobody says which task it would have been
    ]
    right, sure = np.array(told, dtype=np.float64).reshape(-1, 2).T
    bins = reliability(right, sure)
    wrong = sorted(_wrong(rows, answered), key=lambda each: -each["sure"])
    return found.as_dict() | {
        "reliability": bins,
        "ece": calibration_error(bins) if bins else None,
        "wrong": len(wrong),
        "surest_wrong": wrong[:MOST_WRONG],
    }


def _wrong(rows: Sequence[Row], answered: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Answers of the wrong task, or with the wrong class; how sure: of the task, and of the class if there is one."""
    for number, (row, answer) in enumerate(zip(rows, answered, strict=True), 1):
        wrong = row["task"] != answer["task"] or strictly_right(row, answer) is False
        if wrong and answer["task"] is not None:
            yield {
                "row": number,
                "text": _shortened(row.get("text")),
                "task": row["task"],
                "label": row.get("label"),
                "answered_by": answer["task"],
                "answer": answer.get("label"),
                "task_probability": answer["task_probability"],
                "probability": answer.get("probability"),
                "sure": answer["task_probability"] * answer.get("probability", 1.0),
            }


def _shortened(text: Any) -> str | None:
    if not isinstance(text, str):
        return None
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…"


def page_of_marks(facts: Row) -> str:
    """The page as HTML. Raises ModuleNotFoundError where the extra `report` is not installed."""
    rows = facts["figures"][-1]["rows"]
    lead = f"Answers of a bundle of {len(facts['tasks'])} experts to {rows:,} rows whose tasks are known."
    chapters = [_accuracy(facts), _confusion(facts), *_reliability(facts), *_surest_wrong(facts)]
    return render(Page("Marks of a bundle", lead, chapters, [_intro(facts)], f"mergetool {__version__}"))


def _intro(facts: Row) -> Facts:
    whole = facts["figures"][-1]
    pairs = [("rows", f"{whole['rows']:,}"), ("task right", share(whole["right"]))]
    pairs += [] if whole["strict"] is None else [("class too", share(whole["strict"]))]
    pairs += [("refused", f"{sum(facts['refused']):,}")] if "refused" in facts else []
    pairs += [] if facts["ece"] is None else [("calibration error", f"{facts['ece']:.3f}")]
    return Facts(pairs)


def _accuracy(facts: Row) -> Chapter:
    figures = facts["figures"]
    asked = {"task right": _RIGHT} | (
        {"class too": _STRICT} if any(row["strict"] is not None for row in figures) else {}
    )
    parts = {name: [_number(row[keys[0]]) for row in figures] for name, keys in asked.items()}
    whiskers = {
        name: [(_number(row[low]), _number(row[high])) for row in figures] for name, (_, low, high) in asked.items()
    }
    draw = bars(parts, [row["task"] for row in figures], "share of the rows", stacked=False, intervals=whiskers)
    picture = Picture(draw, "Shares with 95 % intervals.", (8.0, max(2.4, 0.4 * len(figures) + 1)))
    columns: list[Column | str] = ["task", Column("rows", "count")]
    for name in asked:
        columns += [Column(name, "share"), *(Column(end, "share", "95 % interval") for end in ("low", "high"))]
    keys = ["task", "rows", *(key for each in asked.values() for key in each)]
    lead = (
        "How often the head of the right task answers, and how often with the right class. Refused rows are not right."
    )
    return Chapter("Accuracy", [picture, _table(columns, keys, figures)], lead)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _confusion(facts: Row) -> Chapter:
    """Counts in the table, shares of the rows of each task in the picture."""
    tasks = facts["tasks"]
    refused = [[count] for count in facts["refused"]] if "refused" in facts else [[] for _ in tasks]
    counts = [[*own, *left] for own, left in zip(facts["confusion"], refused, strict=True)]
    heads = [*tasks, *(["refused"] if "refused" in facts else [])]
    shares = [[count / sum(row) if sum(row) else None for count in row] for row in counts]
    numbers = ".2f" if len(tasks) <= _MOST_NUMBERS else None
    draw = heat(
        shares, tasks, heads, "share of the task's rows", low=0, high=1, numbers=numbers,
        xlabel="answered by", ylabel="rows of",
    )  # fmt: skip
    side = min(len(tasks), _MOST_PLACES)
    picture = Picture(
        draw, "Rows of each task (down) by the task that answered (across).", (3 + 0.7 * side, 2 + 0.5 * side)
    )
    columns: list[Column | str] = ["rows of", Column("rows", "count"), *(Column(name, "count") for name in heads)]
    table = Table(columns, [[task, sum(row), *row] for task, row in zip(tasks, counts, strict=True)])
    lead = "What is off the diagonal was answered by another task's head. Tasks that take each other's rows look alike."
    return Chapter("Who took whose rows", [picture, table], lead)


def _reliability(facts: Row) -> Iterator[Chapter]:
    bins = facts["reliability"]
    if bins:
        cloud = ([each["confidence"] for each in bins], [each["right"] for each in bins])
        draw = points({"rows": cloud}, "probability of the task that answered", "share that is right", diagonal=True)
        picture = Picture(draw, "Rows by how probable the router held the task that answered.", (5.5, 4.5))
        columns = [
            *(Column(name, "fixed") for name in ("from", "to")),
            Column("rows", "count"),
            *(Column(name, "fixed") for name in ("probability", "right")),
        ]
        parts: list[Piece] = [picture, _table(columns, ("low", "high", "items", "confidence", "right"), bins)]
        lead = (
            f"Below the dashed line the router is surer than it is right. The expected calibration error is "
            f"{facts['ece']:.3f}; `mergetool calibrate` fits the probabilities to a few rows. Without refused rows."
        )
        yield Chapter("Reliability of the task", parts, lead)


def _surest_wrong(facts: Row) -> Iterator[Chapter]:
    rows = facts["surest_wrong"]
    if rows:
        columns: list[Column | str] = [Column("row", "count"), "text", "task", "label", "answered by", "answer"]
        columns += [Column("P(task)", "fixed"), Column("P(class)", "fixed"), Column("sure", "fixed", "their product")]
        keys = ("row", "text", "task", "label", "answered_by", "answer", "task_probability", "probability", "sure")
        shown = [row | {"label": None if row["label"] is None else str(row["label"])} for row in rows]
        lead = f"{facts['wrong']:,} answers are wrong; these were the surest. Some may be rows with a wrong label."
        yield Chapter("Surest wrong answers", [_table(columns, keys, shown)], lead)


def _table(columns: Sequence[Column | str], keys: Sequence[str], rows: Sequence[Row]) -> Table:
    return Table(columns, [[row[key] for key in keys] for row in rows])
