"""Rows of a JSON Lines file through a bundle: text, or tensors written as nested lists.

    {"text": "an input"}                        tokenised with the base's tokenizer
    {"text": "an input", "pair": "another"}     two segments
    {"pixel_values": [[[...]]]}                 any inputs of the base model, of one sample

Other keys (`id`, `task`, `label`) are handed through to the answers.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetool.bundle.manifest import Manifest
from mergetool.bundle.model import Answer, MassModel
from mergetool.errors import SourceError

_KEPT = ("id", "task", "label")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file. Raises SourceError for one that is not JSON, holds no input, or a file without rows."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read ({str(error)[:100]})", str(path), "give a JSON Lines file") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(row) - set(_KEPT):
            what = "expected a JSON object with `text`, or with the model's inputs"
            raise SourceError(what, f"{path}:{number}", 'write e.g. {"text": "an input"}')
        rows.append(row)
    if not rows:
        raise SourceError("the input is empty", str(path), "give at least one row")
    return rows


def answers(
    model: MassModel, rows: Sequence[dict[str, Any]], *, tasks: Sequence[str] | None = None, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """One JSON-able answer per row, in order: tasks, coefficients, whose head answered, and its best class."""
    chosen: Any = "route" if tasks is None else model.check_tasks(tasks)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        answer = model(tasks=chosen, **inputs_of(model, batch))
        for place, row in enumerate(batch):
            kept = {key: row[key] for key in _KEPT if key in row}
            yield {**({"row": kept} if kept else {}), **_answer(model.manifest, answer, place)}


def inputs_of(model: MassModel, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as one batch of the base model's inputs. Raises SourceError for rows that do not fit together."""
    if all("text" in row for row in rows):
        tokenizer = model.tokenizer()
        pairs = [row.get("pair") for row in rows] if any("pair" in row for row in rows) else None
        texts = [str(row["text"]) for row in rows]
        return dict(tokenizer(texts, pairs, padding=True, truncation=True, return_tensors="pt"))
    for row in rows:
        words = [key for key, value in row.items() if key not in _KEPT and isinstance(value, str)]
        if "text" not in row and words:
            what = f"a row has no field `text`, but {', '.join(map(repr, words))}"
            raise SourceError(what, "input", f'call the field `text`: {{"text": {json.dumps(row[words[0]][:40])}}}')
    keys = [key for key in rows[0] if key not in _KEPT]
    try:
        return {key: torch.tensor([row[key] for row in rows]) for key in keys}
    except (KeyError, ValueError, TypeError) as error:
        what = f"rows of one batch have inputs of different names or shapes ({str(error)[:100]})"
        raise SourceError(what, "input", "give every row the same inputs, of one shape") from None


def _answer(manifest: Manifest, answer: Answer, place: int) -> dict[str, Any]:
    coefficients = zip(manifest.names, answer.coefficients[place].tolist(), strict=True)
    found: dict[str, Any] = {
        "task": answer.task[place],
        "tasks": list(answer.tasks[place]),
        "coefficients": {name: round(value, 6) for name, value in coefficients},
    }
    head = next(task.head for task in manifest.tasks if task.name == answer.task[place])
    if head is not None:
        scores = answer.logits[place, : head.num_classes]
        best = int(scores.argmax())
        found["class"] = best
        found["label"] = head.labels[best] if head.labels else str(best)
        found["probability"] = round(float(scores.softmax(-1)[best]), 6)
    return found
