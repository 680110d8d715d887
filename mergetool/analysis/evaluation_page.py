"""What `mergetool evaluate` finds, as a page: scores, how sure a model is, what pairs keep, curves, barriers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergetool._version import __version__
from mergetool.pages import Chapter, Column, Page, Picture, Piece, Table, bars, heat, lines, points, render

Row = Mapping[str, Any]
_INTERVAL = (
    Column("score", "fixed"),
    Column("low", "fixed", "95 % interval"),
    Column("high", "fixed", "95 % interval"),
)


def page_of_scores(facts: Row) -> str:
    """Of `Evaluation.facts()`. Raises ModuleNotFoundError where the extra `report` is not installed."""
    tasks = facts["tasks"]
    chapters = [_scores(tasks), *_kept(facts), *_reliability(tasks)]
    return _rendered("Scores", f"{facts['model']} on {len(tasks)} tasks of lm-eval.", chapters)


def page_of_curve(facts: Row) -> str:
    """Of `Curve.as_dict()`. Raises ModuleNotFoundError where the extra `report` is not installed."""
    lead = f"Merges in memory along {facts['along']}, each asked all items."
    return _rendered("Scores along a curve", lead, [_curve(facts, "score"), *_losses(facts), _barriers(facts)])


def page_of_pairs(facts: Row) -> str:
    """Of `PairScores.as_dict()`. Raises ModuleNotFoundError where the extra `report` is not installed."""
    names, size = facts["models"], 1.6 + 0.9 * len(facts["models"])
    picture = Picture(
        heat(facts["matrix"], names, names, "kept of the better one alone", low=0, high=1, numbers=".2f"),
        "What each two models keep when they are merged, in the mean over the tasks.",
        (size + 1, size),
    )
    columns: list[Column | str] = [
        "a",
        "b",
        "task",
        *_INTERVAL,
        Column("better alone", "fixed"),
        Column("kept", "share"),
    ]
    keys = ("a", "b", "task", "score", "low", "high", "better_alone", "kept")
    table = _table(columns, keys, facts["pairs"])
    lead = "Pale cells are pairs that take from each other: merge them with more care, or not with each other."
    alone = _table(["model", "task", *_INTERVAL], ("model", "task", "score", "low", "high"), facts["alone"])
    chapters = [Chapter("Pairs", [picture, table], lead), Chapter("Alone", [alone], "Each model by itself.")]
    return _rendered("Interference of pairs", f"Every pair of {len(names)} models, merged and asked.", chapters)


def _rendered(title: str, lead: str, chapters: Sequence[Chapter]) -> str:
    return render(Page(title, lead, chapters, foot=f"mergetool {__version__}"))


def _scores(tasks: Sequence[Row]) -> Chapter:
    names = [row["task"] for row in tasks]
    whiskers = {"score": [(row["low"], row["high"]) for row in tasks]}
    draw = bars({"score": [row["score"] for row in tasks]}, names, "score", stacked=False, intervals=whiskers)
    columns: list[Column | str] = [
        "task",
        "metric",
        Column("items", "count"),
        *_INTERVAL,
        Column("ECE", "fixed", "calibration error"),
    ]
    table = _table(columns, ("task", "metric", "items", "score", "low", "high", "ece"), tasks)
    picture = Picture(draw, "Scores with 95 % intervals.", (8.0, max(2.0, 0.4 * len(tasks) + 1)))
    return Chapter("Scores", [picture, table], "Differences smaller than the whiskers may be chance.")


def _kept(facts: Row) -> Iterator[Chapter]:
    rows = [row for row in facts["tasks"] if row.get("best_parent")]
    if not rows:
        return
    signed = (Column(name, "signed", "difference to it, 95 % interval") for name in ("low", "high"))
    columns: list[Column | str] = ["task", "best parent", Column("kept", "share"), *signed]
    keys = ("task", "best_parent", "retention", "difference_low", "difference_high")
    parts: list[Piece] = [_table(columns, keys, rows)]
    if told := facts.get("retention"):
        shares = (Column(name, "share") for name in ("mean", "geometric mean", "worst"))
        parts.append(Table([*shares], [[told["mean"], told["geometric"], told["worst"]]]))
    lead = "Its score over that of the best parent on the same items; look at the worst."
    yield Chapter("Kept of the best parent", parts, lead)


def _reliability(tasks: Sequence[Row]) -> Iterator[Chapter]:
    known = {row["task"]: row["reliability"] for row in tasks if row.get("reliability")}
    if known:
        clouds = {
            task: ([each["confidence"] for each in rows], [each["right"] for each in rows])
            for task, rows in known.items()
        }
        draw = points(clouds, "how sure the model is", "share that is right", diagonal=True)
        columns: list[Column | str] = [
            "task",
            *(Column(name, "fixed") for name in ("from", "to")),
            Column("items", "count"),
            Column("sure", "fixed"),
            Column("right", "fixed"),
        ]
        keys = ("task", "low", "high", "items", "confidence", "right")
        rows = [{"task": task, **each} for task, told in known.items() for each in told]
        lead = "Below the dashed line a model is surer than it is right: merges often are."
        picture = Picture(draw, "Items by how sure the model is of its choice.", (5.5, 4.5))
        yield Chapter("Reliability", [picture, _table(columns, keys, rows)], lead)


def _curve(facts: Row, key: str) -> Chapter:
    told = {row["task"]: _line(facts, row["task"], key) for row in facts["barriers"]}
    picture = Picture(lines(told, facts["along"], key), f"The {key} of every task at every point.")
    columns: list[Column | str] = ["task", Column("x", "number"), *_INTERVAL, Column("loss", "number")]
    table = _table(columns, ("task", "x", "score", "low", "high", "loss"), facts["points"])
    lead = "Where a curve sags below the straight line between its ends, the models do not lie in one basin."
    return Chapter("Scores", [picture, table], lead)


def _losses(facts: Row) -> Iterator[Chapter]:
    if all(row["loss"] is not None for row in facts["points"]):
        told = {row["task"]: _line(facts, row["task"], "loss") for row in facts["barriers"]}
        picture = Picture(lines(told, facts["along"], "cross entropy over the choices"), "The less, the better.")
        yield Chapter("Loss", [picture], "Finer than scores: it moves before an answer does.")


def _line(facts: Row, task: str, key: str) -> tuple[list[float], list[float | None]]:
    own = [row for row in facts["points"] if row["task"] == task]
    return [row["x"] for row in own], [row[key] for row in own]


def _barriers(facts: Row) -> Chapter:
    numbers = (Column(name, "number") for name in ("barrier of the error", "at", "barrier of the loss", "at"))
    columns: list[Column | str] = ["task", *numbers, Column("best score", "fixed"), Column("at", "number")]
    keys = ("task", "error_barrier", "error_barrier_at", "loss_barrier", "loss_barrier_at", "best_score", "best_at")
    lead = "How far the curve rises at most above the straight line between its ends: 0 is best."
    return Chapter("Barriers", [_table(columns, keys, facts["barriers"])], lead)


def _table(columns: Sequence[Column | str], keys: Sequence[str], rows: Sequence[Row]) -> Table:
    return Table(columns, [[row.get(key) for key in keys] for row in rows])
