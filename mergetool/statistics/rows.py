"""Calibration data as JSON lines: texts or ids of tokens, with labels where they are given.

{"text": "an input"}                          any field may hold it
{"text": "an input", "pair": "another"}       two segments
{"text": [101, 7592, 102]}                    ids of tokens, taken as they are
{"text": "an input", "label": "positive"}     a class, by its name or number
{"image": "cat.npy"}                          for models of images, a file beside this one
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mergetool.errors import SourceError

_SHOWN = 60
_EXAMPLE = 'write one JSON object a line: {"text": "an input"}'


@dataclass(frozen=True)
class DataRow:
    """One line of a file."""

    place: str
    """Where it stands: FILE:LINE."""
    text: str | tuple[int, ...]
    pair: str | None = None
    label: str | int | None = None


@dataclass(frozen=True)
class Fields:
    """What a file calls things."""

    text: str = "text"
    pair: str = "pair"
    label: str = "label"


def read_rows(path: Path, fields: Fields, most: int | None = None, *, labelled: bool = False) -> tuple[DataRow, ...]:
    """The first rows of a file, all without `most`. Raises SourceError, which names the line, for a wrong one."""
    rows: list[DataRow] = []
    for place, data in _objects(path):
        if len(rows) == most:
            break
        text = _text_of(data, fields.text, place)
        pair = data.get(fields.pair)
        if pair is not None and not (isinstance(pair, str) and isinstance(text, str)):
            raise SourceError(f"field {fields.pair!r} is no text beside a text", place, "write it in quotes")
        rows.append(DataRow(place, text, pair, _label_of(data, fields.label, place) if labelled else None))
    if not rows:
        raise SourceError("holds no rows", str(path), _EXAMPLE)
    return tuple(rows)


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise SourceError(
            f"cannot be read: {reason}", str(path), "check the path; it names a file of JSON lines"
        ) from None


def _object(line: str, place: str) -> Mapping[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise SourceError(f"is no JSON: {_shown(line.strip())}", place, _EXAMPLE) from None
    if not isinstance(data, dict):
        raise SourceError(f"is no JSON object: {_shown(line.strip())}", place, _EXAMPLE)
    return data


def _text_of(data: Mapping[str, Any], field: str, place: str) -> str | tuple[int, ...]:
    if field not in data:
        near = get_close_matches(field, data, n=1, cutoff=0.3) or list(data)
        name = near[0] if near else ""
        fix = (
            f"call it {field!r} in this line, or in a recipe write field: {name} in `calibration`" if near else _EXAMPLE
        )
        raise SourceError(f"has no field {field!r}, but {', '.join(map(repr, data)) or 'nothing'}", place, fix)
    value = data[field]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(type(each) is int and each >= 0 for each in value):
        return tuple(value)
    what = f"field {field!r} is {_shown(json.dumps(value, ensure_ascii=False))}"
    raise SourceError(f"{what}: neither a text nor a list of ids", place, f'write {{"{field}": "an input"}}')


def _label_of(data: Mapping[str, Any], field: str, place: str) -> str | int:
    value = data.get(field)
    if isinstance(value, str) or type(value) is int:
        return value
    what = f"has no field {field!r}" if field not in data else f"field {field!r} is {_shown(json.dumps(value))}"
    fix = f'write its class, {{"{field}": 0}}, or labels: sampled in the recipe, which needs none'
    raise SourceError(what, place, fix)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
