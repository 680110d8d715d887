"""What other models answered to the search items: item response theory learns from them, and no merge need calibrate.

    responses: FILE    JSON lines, one a model and task: {"model": "gpt2", "task": "sums", "answers": [1, 0, null, ...]}
                       by item number (null: not asked), or {"key": 1, ...} by the items' keys; also "soft", likewise
    responses: cache   what the response cache has kept of earlier searches and evaluations, models and merges alike

What a cache gave is written to `responses.jsonl` in the search's folder and read from there when the search goes on: a
cache grows, and a search must not depend on when it was interrupted.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool.errors import EvaluationError
from mergetool.evaluate.cache import ResponseCache
from mergetool.evaluate.items import Score, TaskItems
from mergetool.methods.families.judged import IN_CACHE
from mergetool.tensors.writer import write_file

RESPONSES_NAME = "responses.jsonl"
FEWEST = 0.5
"""Share of a task's search items that a model must have answered, to count."""
FORM = '{"model": "NAME", "task": "TASK", "answers": [1, 0, null]}'

Rows = dict[str, list[dict[int, Score]]]
"""By task: for each model its scores by item."""


def known_rows(asked: str, path: Path, tasks: Sequence[TaskItems], pools: Mapping[str, Sequence[int]]) -> Rows:
    """The models of a file that answered enough of the search items. Raises EvaluationError, also where none did."""
    rows: Rows = {task.name: [] for task in tasks}
    for name, scores in _read(path, {task.name: task for task in tasks}):
        row = {item: scores[item] for item in pools[name] if item in scores}
        if len(row) >= FEWEST * len(pools[name]):
            rows[name].append(row)
    for name, found in rows.items():
        if not found:
            what = f"holds no model's answers to half of the {len(pools[name])} search items of task {name!r}"
            where = "the cache" if asked == IN_CACHE else str(path)
            raise EvaluationError(what, where, "leave `estimator.responses` out, or give it answers to this task")
    return rows


def collect(cache: ResponseCache, tasks: Sequence[TaskItems], but: Collection[str], path: Path) -> None:
    """Write down what a cache knows of these tasks, without what the models `but` answered."""
    lines = []
    for task in tasks:
        for model, scores in sorted(cache.everybody(task.keys).items()):
            if model not in but:
                line = {"model": model, "task": task.name, "answers": {key: s.value for key, s in scores.items()}}
                lines.append(json.dumps(line | {"soft": {key: s.soft for key, s in scores.items()}}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(lines))


def _read(path: Path, tasks: Mapping[str, TaskItems]) -> Iterator[tuple[str, dict[int, Score]]]:
    """(task, scores by item) of every line about one of the tasks."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
            task, answers, soft = tasks.get(line["task"]), line["answers"], line.get("soft", line["answers"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EvaluationError("is not the answers of one model to one task", where, f"write {FORM}") from None
        if task is not None:
            values, softs = (_by_item(part, task, where) for part in (answers, soft))
            yield task.name, {item: Score(value, softs.get(item, value)) for item, value in values.items()}


def _by_item(answers: Any, task: TaskItems, where: str) -> dict[int, float]:
    if isinstance(answers, Mapping):
        given = {item: answers.get(key) for item, key in enumerate(task.keys)}
    elif isinstance(answers, list) and len(answers) == task.num_items:
        given = dict(enumerate(answers))
    else:
        count = f"{len(answers)} answers" if isinstance(answers, list) else "no list of answers"
        what = f"gives {count} to task {task.name!r}, which has {task.num_items} items"
        raise EvaluationError(what, where, "write null for items that were not asked")
    known = {item: value for item, value in given.items() if value is not None}
    for item, value in known.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            what = f"scores item {item} with {value!r}, not with a number from 0 to 1"
            raise EvaluationError(what, where, "write 1 for a right answer, 0 for a wrong one, null for none")
    return {item: float(value) for item, value in known.items()}
