"""Score finished checkpoints on tasks, item by item."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.errors import EvaluationError, at
from mergetool.evaluate.cache import ResponseCache
from mergetool.evaluate.harness import load_task
from mergetool.evaluate.items import Score, TaskItems
from mergetool.evaluate.language_model import LanguageModel
from mergetool.evaluate.options import TaskOptions
from mergetool.evaluate.scores import Chances, Evaluation, TaskScores, digest_of_items
from mergetool.networks.spread import Spread


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
    spread: Spread | None = None,
) -> Evaluation:
    """Score a model folder, and its parents, on every item of the tasks; `include` of tasks is relative to `folder`.

    Raises EvaluationError.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise EvaluationError("a task is named twice", "tasks", "name every task once")
    answers = ResponseCache(cache)
    loaded = {task: load_task(task, folder or Path(), trust_code=trust_code) for task in tasks}
    try:
        opened = partial(LanguageModel, device=device, batch_size=batch_size, spread=spread)
        own, *others = (_scores(path, loaded, opened, answers) for path in (model, *parents))
    finally:
        answers.close()
    return Evaluation(str(model), own, {str(path): scores for path, scores in zip(parents, others, strict=True)})


def _scores(
    path: Path, tasks: Mapping[TaskOptions, Any], opened: Callable[[Path], LanguageModel], cache: ResponseCache
) -> dict[str, TaskScores]:
    """By task."""
    with at(str(path)):
        live = opened(path)
        return {
            options.name: _of_task(TaskItems(options, task, live.lm), path, live, cache)
            for options, task in tasks.items()
        }


def _of_task(items: TaskItems, path: Path, live: LanguageModel, cache: ResponseCache) -> TaskScores:
    known = cache.get(_identity(path, live), items.keys)
    left = [item for item, key in enumerate(items.keys) if not _is_known(known.get(key), items)]
    if left:
        new = {items.keys[item]: score for item, score in items.score(live.lm, left).items()}
        cache.put(_identity(path, live), new)
        known |= new
    return task_scores(items, [known[key] for key in items.keys])


def _is_known(score: Score | None, items: TaskItems) -> bool:
    """Whether all is known of an answer: earlier versions did not keep how sure the model was."""
    return score is not None and (score.confidence is not None or not items.has_choices)


def task_scores(items: TaskItems, scores: Sequence[Score]) -> TaskScores:
    """What a model made of all items of a task."""
    values, chances = np.array([each.value for each in scores]), None
    if items.has_choices:
        chances = Chances(
            np.array([each.soft for each in scores]), np.array([each.confidence for each in scores], dtype=np.float64)
        )
    return TaskScores(items.name, items.metric, digest_of_items(items.keys), values, items.dataset, chances)


def _identity(path: Path, live: LanguageModel) -> str:
    """What the model is: its files as they lie there, and what it runs on."""
    stats = [(file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    facts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    text = json.dumps([facts, live.device.type, str(live.model.dtype)])
    return hashlib.sha256(text.encode()).hexdigest()
