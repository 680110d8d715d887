"""`mergetool compare RUN RUN ...`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli.commands import existing
from mergetool.cli.progress import ProgressBar
from mergetool.cli.show import manner, say, table
from mergetool.units import filesize, setting, timespan

if TYPE_CHECKING:
    from mergetool.analysis.compared import ComparedRuns

_LONG = 40
_DISTANCES = ("a", "b", "relative", "cosine", "share_changed", "max")
_OF_CHANGES = ("change_a", "change_b", "cosine_of_changes", "share_opposed")
_SCORES = ("task", "run", "metric", "items", "score", "low", "high", "retention")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that runs have left, two or more.")],
    base: Annotated[str | None, typer.Option(metavar="C", help="Compare what they changed of this model.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write compare.html and compare.json there.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads (default: one per core).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Lay finished results side by side: recipes, scores, distances between the weights, time and size."""
    from mergetool.api import compare as laid_beside

    with ProgressBar(quiet=manner.quiet) as progress:
        found = laid_beside(*map(existing, runs), base=base, output=output, workers=workers, progress=progress)
    for remark in found.remarks:
        say(f"note: {remark}")
    if output is not None:
        say(f"written: {output / 'compare.html'}, and compare.json")
    if as_json:
        print(found.to_json())
    else:
        _show(found)


def _show(found: "ComparedRuns") -> None:
    _titled("Results", ("run", "method", "kind", "time", "memory", "size", "device"), map(_in_words, found.costs))
    _titled("What the recipes say differently", ("key", *found.runs), found.settings)
    _titled("Scores", _SCORES, found.scores)
    _titled("Kept of the best parent", ("run", "tasks", "mean", "geometric", "worst", "worst_on"), found.retention)
    _titled("Differences on the same items", ("task", "a", "b", "difference", "low", "high"), found.pairs)
    columns = (*_DISTANCES, *(_OF_CHANGES if found.base is not None else ()))
    _titled("Distances between the weights", columns, found.distances)


def _in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    seconds, memory = row["seconds"], row["peak_memory"]
    told = {"time": None if seconds is None else timespan(seconds)}
    return {**row, **told, "memory": None if memory is None else filesize(memory), "size": filesize(row["size"])}


def _titled(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    if cells:
        print(title if title == "Results" else f"\n{title}")
        table([column.replace("_", " ") for column in columns], cells)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "-" if value is None else setting(value)
    return text if len(text) <= _LONG or manner.verbose else f"{text[:_LONG]}..."
