"""Scores of a finished checkpoint, with confidence intervals, and how much it kept of what its parents could do."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import EvaluationError, at
from mergetool.evaluate.cache import ResponseCache
from mergetool.evaluate.harness import load_task
from mergetool.evaluate.items import TaskItems
from mergetool.evaluate.language_model import LanguageModel
from mergetool.evaluate.options import TaskOptions
from mergetool.search.interval import of_difference, of_mean


def assess(
    model: Path,
    tasks: Sequence[TaskOptions],
    *,
    parents: Sequence[Path] = (),
    folder: Path | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    cache: Path | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Score a model folder on every item of the tasks; `include` of tasks is relative to `folder`.

    With parents, each task tells the best of them, the share of its score that was kept (`retention`), and the
    interval of the difference on the same items. JSON-able. Raises EvaluationError.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise EvaluationError("a task is named twice", "tasks", "name every task once")
    answers = ResponseCache(cache)
    loaded = {task: load_task(task, folder or Path(), trust_code=trust_code) for task in tasks}
    try:
        scored = [_scores(path, loaded, device, batch_size, answers) for path in (model, *parents)]
    finally:
        answers.close()
    rows = []
    for task in tasks:
        metric, values = scored[0][task.name]
        low, high = of_mean(values)
        facts = {"task": task.name, "metric": metric, "items": len(values), "score": float(values.mean())}
        facts |= {"low": low, "high": high}
        if parents:
            facts |= _kept(values, {str(p): part[task.name][1] for p, part in zip(parents, scored[1:], strict=True)})
        rows.append(facts)
    return {"model": str(model), "parents": [str(path) for path in parents], "tasks": rows}


def _kept(values: NDArray[np.float64], parents: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    best = max(parents, key=lambda name: float(parents[name].mean()))
    score = float(parents[best].mean())
    low, high = of_difference(values, parents[best])
    return {
        "parents": {name: float(part.mean()) for name, part in parents.items()},
        "best_parent": best,
        "retention": float(values.mean()) / score if score else None,
        "difference_low": low,
        "difference_high": high,
    }


def _scores(
    path: Path, tasks: Mapping[TaskOptions, Any], device: str, batch_size: int, cache: ResponseCache
) -> dict[str, tuple[str, NDArray[np.float64]]]:
    """(metric, one score per item) by task."""
    with at(str(path)):
        live = LanguageModel(path, device=device, batch_size=batch_size)
        scores = {}
        for options, task in tasks.items():
            items = TaskItems(options, task, live.lm)
            known = cache.get(_identity(path, live), items.keys)
            left = [item for item, key in enumerate(items.keys) if key not in known]
            if left:
                new = {items.keys[item]: score for item, score in items.score(live.lm, left).items()}
                cache.put(_identity(path, live), new)
                known |= new
            scores[options.name] = (items.metric, np.array([known[key].value for key in items.keys]))
    return scores


def _identity(path: Path, live: LanguageModel) -> str:
    """What the model is: its files as they lie there, and what it runs on."""
    stats = [(file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    facts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    text = json.dumps([facts, live.model.device.type, str(live.model.dtype)])
    return hashlib.sha256(text.encode()).hexdigest()
