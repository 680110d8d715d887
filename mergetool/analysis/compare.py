"""Finished results side by side: recipes, scores, distances between the weights, time and size."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from mergetool.analysis.compared import ComparedRuns
from mergetool.analysis.recipes_beside import differing_settings
from mergetool.bundle import is_bundle
from mergetool.errors import RecipeError
from mergetool.evaluate.scores import Evaluation, TaskScores, retention, summary_of_retention
from mergetool.outputs.difference import measures
from mergetool.outputs.differing import Listener, difference
from mergetool.outputs.push import read_lock
from mergetool.outputs.scores import kept_scores, scores_path
from mergetool.tensors.folder import is_adapter


@dataclass(frozen=True)
class _Run:
    """A result, as far as it tells of itself."""

    name: str
    path: Path
    lock: dict[str, Any]
    scores: Evaluation | None

    @property
    def kind(self) -> str:
        return "bundle" if is_bundle(self.path) else "adapter" if is_adapter(self.path) else "checkpoint"


def compare_runs(
    paths: Sequence[Path],
    base: str | None = None,
    *,
    workers: int | None = None,
    listener: Listener | None = None,
) -> ComparedRuns:
    """Lay results side by side, those of a sweep one by one; with a base, what they changed of it, too.

    Raises RecipeError for fewer than two, SourceError for a folder that no run has left.
    """
    paths = [result for path in paths for result in _results(path)]
    if len({path.absolute() for path in paths}) < max(2, len(paths)):
        what = "fewer than two results" if len(paths) < 2 else "a result is named twice"
        raise RecipeError(what, ", ".join(map(str, paths)), "name the folders of two or more runs")
    runs = [
        _Run(name, path, read_lock(path), kept_scores(path)) for name, path in zip(_names(paths), paths, strict=True)
    ]
    remarks = list(_remarks(runs))
    distances = list(_distances(runs, base, remarks, partial(difference, workers=workers, listener=listener)))
    return ComparedRuns(
        runs=tuple(each.name for each in runs),
        paths=tuple(str(each.path) for each in runs),
        base=base,
        settings=tuple(differing_settings({each.name: each.lock for each in runs})),
        scores=tuple(_scores(runs)),
        retention=tuple(_retention(runs)),
        pairs=tuple(_pairs(runs)),
        distances=tuple(distances),
        costs=tuple(map(_costs, runs)),
        remarks=tuple(remarks),
    )


def _results(path: Path) -> list[Path]:
    """The result in a folder, or those of a sweep."""
    return [path / str(name) for name in read_lock(path).get("results", ())] or [path]


def _names(paths: Sequence[Path]) -> list[str]:
    """What the results are called: their folders' names, or paths where two have one name."""
    short = [path.absolute().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _remarks(runs: Sequence[_Run]) -> Iterator[str]:
    for run in runs:
        if run.scores is None and scores_path(run.path).exists():
            yield f"the scores beside {run.name} are of other weights: mergetool evaluate {run.path} --tasks ..."


def _parents(runs: Sequence[_Run], scores: TaskScores) -> dict[str, TaskScores]:
    """All parents, of whatever run, that have answered the same items."""
    known = {
        name: tasks[scores.task]
        for run in runs
        if run.scores is not None
        for name, tasks in run.scores.parents.items()
        if scores.task in tasks
    }
    return {name: each for name, each in known.items() if scores.is_of_the_same(each)}


def _scores(runs: Sequence[_Run]) -> Iterator[dict[str, Any]]:
    """A row for each task and run, those of parents behind."""
    for task in dict.fromkeys(task for run in runs if run.scores is not None for task in run.scores.tasks):
        parents: dict[str, TaskScores] = {}
        for run in runs:
            if run.scores is not None and task in run.scores.tasks:
                own = run.scores.tasks[task]
                of_it = _parents(runs, own)
                parents |= of_it
                best = max(of_it, key=lambda name: of_it[name].score) if of_it else None
                kept = None if best is None else retention(own, of_it[best])
                yield {"run": run.name, **own.facts(), "best_parent": best, "retention": kept}
        for name, each in parents.items():
            yield {"run": name, **each.facts(), "best_parent": None, "retention": None}


def _retention(runs: Sequence[_Run]) -> Iterator[dict[str, Any]]:
    """What each run keeps of the best of the parents, over all tasks that both have answered."""
    for run in runs:
        if run.scores is None:
            continue
        kept = {}
        for task, scores in run.scores.tasks.items():
            parents = _parents(runs, scores).values()
            share = retention(scores, max(parents, key=lambda each: each.score)) if parents else None
            if share is not None:
                kept[task] = share
        if kept:
            worst = min(kept, key=lambda task: kept[task])
            yield {"run": run.name, "tasks": len(kept), **summary_of_retention(list(kept.values())), "worst_on": worst}


def _pairs(runs: Sequence[_Run]) -> Iterator[dict[str, Any]]:
    """How much better one run is than another one, where both have answered the same items."""
    for one, other in combinations([run for run in runs if run.scores is not None], 2):
        assert one.scores is not None
        assert other.scores is not None
        for task, scores in one.scores.tasks.items():
            theirs = other.scores.tasks.get(task)
            if theirs is not None and scores.is_of_the_same(theirs):
                low, high = scores.difference(theirs)
                facts = {"task": task, "a": one.name, "b": other.name, "difference": scores.score - theirs.score}
                yield facts | {"low": low, "high": high}


def _distances(
    runs: Sequence[_Run], base: str | None, remarks: list[str], compared: "partial[Any]"
) -> Iterator[dict[str, Any]]:
    """What diff says of each pair, in all."""
    for one, other in combinations(runs, 2):
        if "bundle" in (one.kind, other.kind) or one.kind != other.kind:
            remarks.append(f"{one.name} ({one.kind}) and {other.name} ({other.kind}) have no weights to compare")
            continue
        found = compared(str(one.path), str(other.path), base)
        remarks += (text for text in found.remarks if text not in remarks)
        figures = measures(found.total, based=base is not None)
        yield {"a": one.name, "b": other.name, "identical": found.identical_weights, **figures}


def _costs(run: _Run) -> dict[str, Any]:
    """What a run took, and what it left."""
    told, output = run.lock.get("run", {}), run.lock["output"]
    return {
        "run": run.name,
        "method": _method(run.lock["recipe"]),
        "kind": run.kind,
        "seconds": told.get("seconds"),
        "peak_memory": told.get("peak_memory"),
        "bytes_read": told.get("bytes_read"),
        "size": sum(map(_size, (run.path / name for name in output["files"]))),
        "device": told.get("device"),
        "mergetool": run.lock.get("mergetool"),
    }


def _method(recipe: Mapping[str, Any]) -> str | None:
    """With the steps after it."""
    then = [str(step.get("step")) for step in recipe.get("then", ()) if isinstance(step, Mapping)]
    return ", then ".join(filter(None, [recipe.get("merge", {}).get("method"), *then])) or None


def _size(path: Path) -> int:
    with suppress(OSError):  # verify tells what is missing
        return path.stat().st_size
    return 0
