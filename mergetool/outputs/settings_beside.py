"""What differs beside the weights: configs, tokens, chat templates; and what two locks say."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergetool.checkpoints.chat import token_texts
from mergetool.checkpoints.other_rows import OtherRows
from mergetool.checkpoints.vocabulary import chat_template_of, small_json
from mergetool.errors import SourceError
from mergetool.outputs.difference import Comparison, FileDifference
from mergetool.tensors.side_files import CONFIG_NAME, GENERATION_NAME
from mergetool.tensors.source import ModelSource

_NAMES = frozenset({"_name_or_path", "transformers_version"})
"""Keys that say where a config comes from, and nothing about the model."""
_RUN = frozenset({"run"})
"""What a lock says of times and memory."""
_FIRST = ("recipe", "settings", "seed", "inputs", "origins", "versions", "mergetool")
_LONG = 200


def settings_beside(one: ModelSource, other: ModelSource, rows: OtherRows) -> Iterator[FileDifference]:
    """All that differs in the folders of two checkpoints."""
    if one.folder is None or other.folder is None:
        return
    for name in (CONFIG_NAME, GENERATION_NAME, "adapter_config.json"):
        yield from _differing(name, small_json(one.folder / name), small_json(other.folder / name), _NAMES)
    yield from _tokens(rows)
    yield from _differing("tokenizer", token_texts(one.folder), token_texts(other.folder))
    templates = [chat_template_of(source.folder) for source in (one, other)]
    if templates[0] != templates[1]:
        yield FileDifference("chat template", *_first_difference(*templates))


def _tokens(rows: OtherRows) -> Iterator[FileDifference]:
    if rows.order is not None:
        yield FileDifference("tokenizer", "order", rows.order, None)
    for key, tokens in (("only in the first", rows.lacked), ("only in the second", rows.more)):
        if tokens:
            told = f"{len(tokens)} tokens: {', '.join(repr(token) for token in tokens[:5])}"
            yield FileDifference("tokenizer", key, *((told, None) if tokens is rows.lacked else (None, told)))


def _first_difference(one: str | None, other: str | None) -> tuple[str, str | None, str | None]:
    """The first line of two texts that is not the same."""
    if one is None or other is None:
        return "", one and "there is one", other and "there is one"
    lines = [*zip(one.splitlines(), other.splitlines(), strict=False)]
    number = next((number for number, (a, b) in enumerate(lines) if a != b), len(lines))
    a, b = (text.splitlines()[number : number + 1] for text in (one, other))
    return f"line {number + 1}", a[0][:_LONG] if a else None, b[0][:_LONG] if b else None


def _differing(
    file: str, one: Mapping[str, Any], other: Mapping[str, Any], without: frozenset[str] = frozenset()
) -> Iterator[FileDifference]:
    """Keys that have other values, or that only one has (its other value is None)."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    for key in sorted({*ours, *theirs}):
        if key.partition(".")[0] not in without and ours.get(key) != theirs.get(key):
            yield FileDifference(file, key, ours.get(key), theirs.get(key))


def leaves(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Values that are no mappings, under dotted keys."""
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            yield from leaves(each, f"{before}{key}.")
        else:
            yield f"{before}{key}", each


def is_lock(text: str) -> bool:
    """Whether a reference is a lock, not a model."""
    return text.endswith(".json") and Path(text).is_file() and not text.endswith(".index.json")


def difference_of_locks(one: str, other: str) -> Comparison:
    """What two locks say differently: recipes, inputs, seeds, versions, digests. Raises SourceError."""
    ours, theirs = (_by_file(_lock(Path(text))) for text in (one, other))
    found = _differing("mergetool.json", ours, theirs, _RUN)
    return Comparison(one, other, files=tuple(sorted(found, key=_of_what_is_asked_first)))


def _by_file(lock: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same lock, with the SHA-256 of inputs under their names."""
    inputs = lock.get("inputs")
    if not isinstance(inputs, dict):
        return lock
    files = {
        name: {str(each["file"]): each.get("sha256") for each in listed if isinstance(each, dict) and "file" in each}
        for name, listed in inputs.items()
        if isinstance(listed, list)
    }
    return {**lock, "inputs": files}


def _of_what_is_asked_first(each: FileDifference) -> int:
    """What people decided stands before what came of it."""
    section = each.key.partition(".")[0]
    return _FIRST.index(section) if section in _FIRST else len(_FIRST)


def _lock(path: Path) -> Mapping[str, Any]:
    try:
        lock = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        lock = None
    if not isinstance(lock, dict) or "mergetool" not in lock:
        raise SourceError("is not a lock that a run has written", str(path), "name a mergetool.json, or a model")
    return lock
