"""Finished results side by side, as a page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool._version import __version__
from mergetool.analysis.compared import ComparedRuns
from mergetool.analysis.written import write_both
from mergetool.pages import Chapter, Column, Facts, Note, Page, Picture, Piece, Table, bars, heat, render
from mergetool.pages.cells import share
from mergetool.units import setting, timespan

_COSTS = (
    Column("result"),
    Column("method", "code"),
    "kind",
    Column("time", "seconds"),
    Column("memory", "bytes", "most that the run held"),
    Column("size", "bytes"),
    "device",
)
_COSTS_KEYS = ("run", "method", "kind", "seconds", "peak_memory", "size", "device")
_DISTANCES = (
    Column("relative", "number", "norm of the difference over the norm of the first"),
    Column("cosine", "number"),
    Column("share changed", "share", "of the entries that are not equal"),
    Column("max", "number", "the largest difference of an entry"),
)
_OF_CHANGES = (
    Column("change a", "number", "norm of what the first changed, over the norm of the base"),
    Column("change b", "number", "norm of what the second changed, over the norm of the base"),
    Column("cosine of changes", "number", "between the two task vectors"),
    Column("share opposed", "share", "of the entries that the two move in opposite directions"),
)


def write_compared(found: ComparedRuns, folder: Path) -> Path:
    """Write `compare.json` and the page, whose path is returned. Raises OutputError."""
    return write_both(folder, "compare", found.to_json(), lambda: page(found))


def page(found: ComparedRuns) -> str:
    """The page as HTML. Raises ModuleNotFoundError where the extra `report` is not installed."""
    lead = f"{len(found.runs)} results of mergetool run, side by side: {', '.join(found.runs)}."
    notes: list[Piece] = [Note(text, "warn") for text in found.remarks]
    chapters = [
        *_scores(found),
        *_retention(found),
        *_pairs(found),
        _settings(found),
        *_distances(found),
        _costs(found),
    ]
    return render(Page("Results side by side", lead, chapters, [*_facts(found), *notes], f"mergetool {__version__}"))


def _facts(found: ComparedRuns) -> Iterator[Facts]:
    if found.retention:
        best = max(found.retention, key=lambda row: float(row["mean"]))
        kept = f"{share(best['mean'])} ({best['run']})"
        yield Facts([("results", str(len(found.runs))), ("most kept of the best parents", kept)])
    else:
        seconds = [row["seconds"] for row in found.costs if row["seconds"] is not None]
        yield Facts([("results", str(len(found.runs))), ("time of the longest", timespan(max(seconds, default=0)))])


def _scores(found: ComparedRuns) -> Iterator[Chapter]:
    if not found.scores:
        return
    columns: list[Column | str] = ["task", "result", "metric", Column("items", "count"), Column("score", "fixed")]
    columns += [Column("low", "fixed", "95 % interval"), Column("high", "fixed", "95 % interval")]
    columns += [Column("ECE", "fixed", "expected calibration error")]
    columns += [Column("kept", "share", "of the best parent's score on the same items"), "best parent"]
    keys = ("task", "run", "metric", "items", "score", "low", "high", "ece", "retention", "best_parent")
    lead = "A bar is a score, its whisker the 95 % interval; intervals that overlap may still differ: see the pairs."
    names = list(dict.fromkeys(row["task"] for row in found.scores))
    size = (8.0, max(2.4, 0.3 * len(found.scores) + 1))
    picture = Picture(_bars(found.scores, names), "Scores of results, and of parents where they were asked.", size)
    yield Chapter("Scores", [picture, _table(columns, keys, found.scores)], lead)


def _bars(scores: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Any:
    runs = dict.fromkeys(row["run"] for row in scores)
    known = {(row["run"], row["task"]): row for row in scores}
    parts = {run: [_of(known.get((run, task)), "score") for task in tasks] for run in runs}
    whiskers = {
        run: [(_of(known.get((run, task)), "low"), _of(known.get((run, task)), "high")) for task in tasks]
        for run in runs
    }
    return bars(parts, tasks, "score", stacked=False, intervals=whiskers)


def _of(row: Mapping[str, Any] | None, key: str) -> float:
    return float("nan") if row is None else float(row[key])


def _retention(found: ComparedRuns) -> Iterator[Chapter]:
    if found.retention:
        shares = (Column(name, "share") for name in ("mean", "geometric mean", "worst"))
        columns: list[Column | str] = ["result", Column("tasks", "count"), *shares, "worst on"]
        keys = ("run", "tasks", "mean", "geometric", "worst", "worst_on")
        lead = "A merge that keeps much on average may have lost one task: look at the worst."
        table = _table(columns, keys, found.retention)
        yield Chapter("Kept of the best parent", [table], lead)


def _pairs(found: ComparedRuns) -> Iterator[Chapter]:
    if found.pairs:
        signed = (Column(name, "signed") for name in ("a - b", "low", "high"))
        columns: list[Column | str] = ["task", "a", "b", *signed]
        told = [row["low"] > 0 or row["high"] < 0 for row in found.pairs]
        table = _table(columns, ("task", "a", "b", "difference", "low", "high"), found.pairs, told)
        lead = "Two results on the same items: where the interval leaves out 0 (bold), one is better than by chance."
        yield Chapter("Differences on the same items", [table], lead)


def _settings(found: ComparedRuns) -> Chapter:
    rows = [[row["key"], *(_text(row[run]) for run in found.runs)] for row in found.settings]
    columns = [Column("key", "code"), *(Column(run, "code") for run in found.runs)]
    parts = [Table(columns, rows)] if rows else [Note("Nothing: the same recipe, inputs and versions.")]
    return Chapter("What the recipes say differently", parts, "Only what is not the same in all of them.")


def _text(value: Any) -> str | None:
    return None if value is None else setting(value)


def _distances(found: ComparedRuns) -> Iterator[Chapter]:
    if not found.distances:
        return
    based = found.base is not None
    columns = ["a", "b", *_DISTANCES, *(_OF_CHANGES if based else ())]
    keys = ["a", "b", "relative", "cosine", "share_changed", "max"]
    keys += ["change_a", "change_b", "cosine_of_changes", "share_opposed"] if based else []
    parts: list[Piece] = [_table(columns, keys, found.distances)]
    if len(found.runs) > 2:
        key = "cosine_of_changes" if based else "cosine"
        size = (1.6 + 0.9 * len(found.runs), 1.2 + 0.6 * len(found.runs))
        parts.insert(0, Picture(_map(found, key), f"{key.replace('_', ' ').capitalize()} of each two.", size))
    lead = "How far the weights are apart: results that are nearly the same need not both be kept."
    yield Chapter("Distances between the weights", parts, lead)


def _map(found: ComparedRuns, key: str) -> Any:
    known = {frozenset((row["a"], row["b"])): row[key] for row in found.distances}
    values = [[1.0 if a == b else known.get(frozenset((a, b))) for b in found.runs] for a in found.runs]
    return heat(values, found.runs, found.runs, "cosine", low=-1, high=1, diverging=True, numbers=".2f")


def _costs(found: ComparedRuns) -> Chapter:
    return Chapter("Time and size", [_table(_COSTS, _COSTS_KEYS, found.costs)], "What each run took, and what it left.")


def _table(
    columns: Sequence[Column | str],
    keys: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    strong: Sequence[bool] = (),
) -> Table:
    bold = [place for place, told in enumerate(strong) if told]
    return Table(columns, [[row[key] for key in keys] for row in rows], strong=bold)
