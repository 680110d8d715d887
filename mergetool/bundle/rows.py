"""Rows of a JSON Lines file through a bundle: text, or tensors written as nested lists.

    {"text": "an input"}                        tokenised with the base's tokenizer
    {"text": "an input", "pair": "another"}     two segments
    {"pixel_values": [[[...]]]}                 any inputs of the base model, of one sample

What comes back has a `label`: a class, several classes, a value, a class for every token, or the text of a span.
Other keys (`id`, `task`, `label`) are handed through to the answers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetool.bundle.answer import UNKNOWN, kind_of, label_of
from mergetool.bundle.manifest import ClassHead, Head, Manifest
from mergetool.bundle.mass_model import Answer, MassModel
from mergetool.errors import SourceError

_KEPT = ("id", "task", "label")


class Row(dict[str, Any]):
    """A row of a file, which knows where it was read."""

    place = ""


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises SourceError for one that is not JSON, holds no input, or a file without rows."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read ({str(error)[:100]})", str(path), "give a JSON Lines file") from None
    rows: list[Row] = []
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
        rows.append(Row(row))
        rows[-1].place = f"{path}:{number}"
    if not rows:
        raise SourceError("the input is empty", str(path), "give at least one row")
    return rows


def answers(
    model: MassModel, rows: Sequence[dict[str, Any]], *, tasks: Sequence[str] | None = None, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """One JSON-able answer per row, in order: tasks, coefficients, whose head answered, and its best class."""
    chosen: Any = "route" if tasks is None else model.check_tasks(tasks)
    decode = _decoder(model) if all("text" in row for row in rows) else None
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = inputs_of(model, batch)
        answer = model(tasks=chosen, **on_device_of(model, inputs))
        answer = replace(answer, logits=answer.logits.cpu())
        for place, row in enumerate(batch):
            kept = {key: row[key] for key in _KEPT if key in row}
            yield {**({"row": kept} if kept else {}), **_answer(model.manifest, answer, place, inputs, decode)}


def _decoder(model: MassModel) -> Callable[[Tensor], str]:
    """From token ids to text."""
    tokenizer = model.tokenizer()
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def inputs_of(model: MassModel, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as one batch of the base model's inputs. Raises SourceError for rows that do not fit together."""
    if any("text" in row for row in rows):
        texts = _words(rows, "text")
        pairs = _words(rows, "pair") if any("pair" in row for row in rows) else None
        if pairs is None:
            return model.read(texts)
        return model.read([{"text": text, "pair": pair} for text, pair in zip(texts, pairs, strict=True)])
    keys = [key for key in rows[0] if key not in _KEPT]
    return {key: _stacked(rows, key) for key in keys}


def on_device_of(model: MassModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch where the model wants it."""
    return {key: value.to(model.device) for key, value in inputs.items()}


def _words(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """A field of text of every row."""
    for number, row in enumerate(rows, 1):
        if key not in row:
            raise _lacking(rows, number, key)
        if not isinstance(row[key], str):
            what = f"field `{key}` is {_shown(row[key])}, not text"
            raise SourceError(what, place_of(row, number), f'write it in quotes: {{"{key}": "..."}}')
    return [row[key] for row in rows]


def _stacked(rows: Sequence[dict[str, Any]], key: str) -> Tensor:
    """A field of numbers of every row, as one tensor."""
    tensors: list[Tensor] = []
    for number, row in enumerate(rows, 1):
        if key not in row:
            raise _lacking(rows, number, key)
        try:
            tensors.append(torch.tensor(row[key]))
        except (ValueError, TypeError):
            raise _not_numbers(row, number, key) from None
        if tensors[-1].shape != tensors[0].shape:
            what = f"field `{key}` is of shape {list(tensors[-1].shape)}, {list(tensors[0].shape)} in the first row"
            fix = "give every row of a batch one shape, or answer rows one by one: --batch-size 1"
            raise SourceError(what, place_of(row, number), fix)
    return torch.stack(tensors)


def _lacking(rows: Sequence[dict[str, Any]], number: int, key: str) -> SourceError:
    """The error for a row without a field that another row has."""
    row = rows[number - 1]
    others = [name for name in row if name not in _KEPT]
    what = f"has no field `{key}`, but {', '.join(map(repr, others)) or 'none'}; another row has it"
    if key == "pair":
        fix = "give every row a `pair`, or put the rows without one into a file of their own"
        return SourceError("has no field `pair`; another row has it", place_of(row, number), fix)
    example = row[others[0]] if others and isinstance(row[others[0]], str) else "..."
    return SourceError(what, place_of(row, number), f"call the field `{key}`: {json.dumps({key: example[:40]})}")


def _not_numbers(row: dict[str, Any], number: int, key: str) -> SourceError:
    """The error for a field that is no nested list of numbers."""
    what = f"field `{key}` is {_shown(row[key])}, not numbers in lists of equal lengths"
    text = json.dumps({"text": row[key][:40]}) if isinstance(row[key], str) else ""
    fix = f"call the field `text`: {text}" if text else f'write e.g. {{"{key}": [1, 2, 3]}}'
    return SourceError(what, place_of(row, number), fix)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def place_of(row: dict[str, Any], number: int) -> str:
    """The line of a file that a row was read from, or its number among those that were given together."""
    return row.place if isinstance(row, Row) else f"row {number}"


def _answer(
    manifest: Manifest, answer: Answer, place: int, inputs: Mapping[str, Tensor], decode: Callable[[Tensor], str] | None
) -> dict[str, Any]:
    coefficients = zip(manifest.names, answer.coefficients[place].tolist(), strict=True)
    name = answer.task[place]
    fields: dict[str, Any] = {
        "task": name,
        "known": answer.known[place],
        "task_probability": round(answer.probability[place], 6),
        "runner_up": answer.runner_up[place],
        "tasks": list(answer.tasks[place]),
        "coefficients": {name: round(value, 6) for name, value in coefficients},
    }
    if name is None:
        return fields | {"label": UNKNOWN}
    task = manifest.tasks[manifest.names.index(name)]
    if task.head is None:
        return fields
    scores = answer.logits[place]
    match kind_of(task.head):
        case "sample":
            return fields | label_of(task.head, scores if scores.ndim == 1 else scores[0])
        case "token":
            return fields | _labels_of_tokens(task.head, scores, _mask(inputs, place, len(scores)))
        case "span":
            return fields | _span(scores, _mask(inputs, place, len(scores)), inputs, place, decode)


def _labels_of_tokens(head: Head | ClassHead, scores: Tensor, mask: Tensor) -> dict[str, Any]:
    best = scores[:, : head.num_classes].argmax(-1)[mask].tolist()
    names = [head.labels[label] if head.labels else str(label) for label in best]
    return {"labels": names, "label": " ".join(names)}


def _span(
    scores: Tensor, mask: Tensor, inputs: Mapping[str, Tensor], place: int, decode: Callable[[Tensor], str] | None
) -> dict[str, Any]:
    """The best span that does not end before it starts, of tokens that are no padding."""
    start, end = (scores[:, side].masked_fill(~mask, float("-inf")) for side in (0, 1))
    together = start[:, None] + end[None, :]
    ordered = torch.ones_like(together, dtype=torch.bool).triu()
    first, last = divmod(int(together.masked_fill(~ordered, float("-inf")).argmax()), len(scores))
    span: dict[str, Any] = {"start": first, "end": last, "label": f"{first}-{last}"}
    if decode is not None and "input_ids" in inputs:
        span["text"] = span["label"] = decode(inputs["input_ids"][place, first : last + 1])
    return span


def _mask(inputs: Mapping[str, Tensor], place: int, length: int) -> Tensor:
    """Which of a sample's tokens are no padding."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] != length:
        return torch.ones(length, dtype=torch.bool)
    return mask[place] != 0
