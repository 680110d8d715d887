"""What a search found and what it cost, as plain data: the report in JSON, from which the page is drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.evaluate.items import Score
from mergetool.search.interval import of_weighted_difference
from mergetool.search.space import SearchSpace
from mergetool.tuning.loop import CALIBRATION, History, Trial, Values
from mergetool.tuning.scorer import REPORT, Scorer, Subject
from mergetool.tuning.splits import Splits

PARENT_NAME = "parent.yaml"


def facts_of(
    history: History, scorer: Scorer, splits: Splits, space: SearchSpace, weights: Sequence[float]
) -> dict[str, Any]:
    """Everything about a finished search, JSON-able. Scores are lists with one number per task."""
    assert history.winner is not None
    mean = _Mean(weights)
    names = [gene.name for gene in space.genes]
    return {
        "tasks": [
            {"name": name, "metric": scorer.tasks[name].metric, "weight": weight, "search_items": len(pool)}
            | {"report_items": len(splits.report[name]), "asked_items": len(history.prepared[name].ids)}
            | {"estimator": history.prepared[name].estimator.kind, **_check(history, name)}
            for (name, pool), weight in zip(splits.search.items(), weights, strict=True)
        ],
        "genes": names,
        "winner": _candidate(history.winner, history, scorer, mean) | {"recipe": "recipe.yaml"},
        "front": [
            _candidate(values, history, scorer, mean) | {"recipe": f"front/{place:02d}.yaml"}
            for place, values in enumerate(history.front)
        ],
        "compared": [
            {"name": who if isinstance(who, str) else "start of the search"}
            | {"report": list(scores), "report_mean": mean(scores)}
            for who, scores in history.report.items()
            if isinstance(who, str) or who == space.start
        ],
        "best_parent": _best_parent(history, scorer, splits, weights),
        "trials": [_trial(trial, scorer, splits, mean) for trial in history.trials],
        "spent": _spent(history, scorer, splits),
        "seconds": {"merge": round(scorer.spent.merge_seconds, 3), "evaluate": round(scorer.spent.evaluate_seconds, 3)},
    }


def verdict(facts: dict[str, Any], recipe: str) -> tuple[str, bool]:
    """What the search was worth, against the best of the models: a sentence, and whether the winner lost.

    `recipe` is the file that makes that model instead.
    """
    parent, winner = facts["best_parent"], facts["winner"]["report_mean"]
    name = "the base" if parent["name"] == "base" else f"its parent {parent['name']!r}"
    numbers = (
        f"{winner:.4f} against {parent['report_mean']:.4f} on items that took no part in the search (difference "
        f"{parent['difference']:+.4f}, 95 % interval {parent['difference_low']:+.4f} to "
        f"{parent['difference_high']:+.4f})"
    )
    if parent["difference"] < 0:
        chance = ", which may be chance" if parent["difference_high"] > 0 else ""
        told = f"the winner LOSES to {name}: {numbers}{chance}; to get that model instead: mergetool run {recipe}"
        return told, True
    if parent["difference_low"] <= 0:
        return f"the winner is not known to be better than {name}: {numbers}", False
    return f"the winner beats {name}: {numbers}", False


def _best_parent(history: History, scorer: Scorer, splits: Splits, weights: Sequence[float]) -> dict[str, Any]:
    """The base or model with the best score on the report items, and how far the winner is from it."""
    mean = _Mean(weights)
    assert history.winner is not None
    models = [who for who in history.report if isinstance(who, str)]
    best = max(models, key=lambda who: mean(history.report[who]))
    ours, theirs = (scorer.known(who, splits.report) or {} for who in (history.winner, best))
    pairs = [(_values(ours[task]), _values(theirs[task])) for task in splits.report]
    low, high = of_weighted_difference(pairs, weights)
    return {
        "name": best,
        "recipe": PARENT_NAME,
        "report_mean": mean(history.report[best]),
        "difference": round(mean(history.report[history.winner]) - mean(history.report[best]), 12),
        "difference_low": low,
        "difference_high": high,
    }


def _values(scores: dict[int, Score]) -> NDArray[np.float64]:
    return np.array([score.value for score in scores.values()])


class _Mean:
    """The weighted mean of one score per task."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = np.array(weights)

    def __call__(self, scores: Sequence[float]) -> float:
        return float(self._weights @ np.array(scores))


def _check(history: History, task: str) -> dict[str, Any]:
    """How estimators did on held-out merges, if that was tried."""
    prepared = history.prepared[task]
    if prepared.check is None:
        return {}
    return {
        "dimensions": prepared.num_dimensions,
        "blend": prepared.estimator.blend,
        "held_out_errors": prepared.check.errors,
        "held_out_rank_correlations": prepared.check.ranks,
    }


def _candidate(values: Values, history: History, scorer: Scorer, mean: _Mean) -> dict[str, Any]:
    trial = next(trial for trial in history.trials if trial.values == values)
    assert trial.estimates is not None
    asked = {task: prepared.ids for task, prepared in history.prepared.items()}
    raw = scorer.known(values, asked) or {}
    return {
        "values": list(values),
        "asked": [float(np.mean([score.value for score in part.values()])) for part in raw.values()],
        "estimate": [estimate.value for estimate in trial.estimates],
        "estimate_error": [estimate.error for estimate in trial.estimates],
        "search": list(history.finalists[values]),
        "search_mean": mean(history.finalists[values]),
        "report": list(history.report[values]),
        "report_mean": mean(history.report[values]),
        "digest": scorer.digest(values),
    }


def _trial(trial: Trial, scorer: Scorer, splits: Splits, mean: _Mean) -> dict[str, Any]:
    record: dict[str, Any] = {"generation": trial.generation, "values": list(trial.values)}
    if trial.estimates is None:
        return record | {"failure": scorer.failure(trial.values)}
    record |= {"estimate": [estimate.value for estimate in trial.estimates], "fitness": trial.fitness}
    if (full := scorer.known(trial.values, splits.search)) is not None:
        record["search"] = [float(np.mean([score.value for score in part.values()])) for part in full.values()]
        record["search_mean"] = mean(record["search"])
    return record


def _spent(history: History, scorer: Scorer, splits: Splits) -> dict[str, Any]:
    """Items answered by stage; and what asking every candidate all search items would have taken.

    A search that asks everything needs no merges to calibrate, so they are no candidates of it.
    """
    candidates: set[Subject] = {
        trial.values for trial in history.trials if trial.estimates is not None and trial.generation != CALIBRATION
    }
    searching = sum(count for stage, count in scorer.spent.items.items() if stage != REPORT)
    full = len(candidates) * splits.num_search
    return {
        "items": dict(scorer.spent.items),
        "requests": scorer.spent.requests,
        "candidates": len(candidates),
        "searching": searching,
        "full_search": full,
        "reduction": full / searching if searching else 0.0,
    }
