"""Rows as a network takes them: ids of tokens, and the number of a class."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.errors import PlanError, SourceError
from mergetool.networks.library import quiet
from mergetool.networks.tokenizer import load_tokenizer
from mergetool.statistics.rows import DataRow

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ENDLESS = 1_000_000
"""What tokenizers call their greatest length where they have none is more than this."""
_CHARACTERS = 4
"""Of a token, roughly."""
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Example:
    """One row, as numbers."""

    place: str
    inputs: Mapping[str, tuple[Any, ...]]
    label: int | None = None
    image: Path | None = None
    """Instead of inputs, the file that holds the pixels."""
    digest: str = ""
    """Of the pixels."""
    patches: int = 0
    """Of a row that is no tokens, how many count as such."""

    @property
    def length(self) -> int:
        return self.patches or len(self.inputs["input_ids"])

    @property
    def content(self) -> list[Any]:
        """All that decides what a network makes of it."""
        return [dict(self.inputs), self.label, *([self.digest] if self.image else [])]


def examples_of(
    rows: Sequence[DataRow], folder: Path, config: Mapping[str, Any], length: int | None, tokenizer: Path | None
) -> tuple[Example, ...]:
    """Rows for the model of a folder; with `length`, rows of more tokens are cut.

    Raises SourceError for rows that are too long, for tokens that the model lacks, and for classes that it lacks.
    """
    words = _Words(folder, tokenizer or folder, config, length) if any(isinstance(r.text, str) for r in rows) else None
    most = min(filter(None, (_positions(config), words.most if words else None)), default=None)
    if length is not None and most is not None and length > most:
        what = f"length is {length}, and the model takes {most} tokens at most"
        raise PlanError(what, "calibration.length", f"write length: {most}")
    found = []
    for row in rows:
        inputs = words.inputs(row) if words and isinstance(row.text, str) else _ids(row, length)
        _check(inputs["input_ids"], row.place, most, config)
        found.append(Example(row.place, inputs, class_of_row(row, config)))
    return tuple(found)


def guessed_examples(rows: Sequence[DataRow], length: int | None) -> tuple[Example, ...]:
    """Rows whose tokens are not known yet: about as many as there should be, to plan with."""
    sizes = (len(row.text) if isinstance(row.text, tuple) else 1 + len(row.text) // _CHARACTERS for row in rows)
    return tuple(
        Example(row.place, {"input_ids": (0,) * min(size, length or size)})
        for row, size in zip(rows, sizes, strict=True)
    )


class _Words:
    """The tokenizer of a model."""

    def __init__(self, folder: Path, place: Path, config: Mapping[str, Any], length: int | None) -> None:
        self._tokenizer = load_tokenizer(place, fix="write tokenizer: MODEL in `calibration`, or give ids of tokens")
        self._length = length
        known = self._tokenizer.model_max_length
        self.most = int(known) if 0 < known < _ENDLESS else None

    def inputs(self, row: DataRow) -> dict[str, tuple[int, ...]]:
        cut = {} if self._length is None else {"truncation": True, "max_length": self._length}
        with quiet():
            made = self._tokenizer(row.text, row.pair, **cut)
        return {name: tuple(made[name]) for name in _INPUTS if name in made}


def _ids(row: DataRow, length: int | None) -> dict[str, tuple[int, ...]]:
    ids = tuple(int(each) for each in row.text)[:length]
    return {"input_ids": ids, "attention_mask": (1,) * len(ids)}


def _positions(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config") or config
    value = text.get("max_position_embeddings") or text.get("n_positions")
    taken = 1 + int(text.get("pad_token_id") or 0) if config.get("model_type") in _OFFSET else 0
    return int(value) - taken if isinstance(value, int) else None


_OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Networks that count positions from behind that of padding."""


def _check(ids: Sequence[int], place: str, most: int | None, config: Mapping[str, Any]) -> None:
    if not ids:
        raise SourceError("has no tokens", place, "remove that line, or write some text")
    if most is not None and len(ids) > most:
        fix = f"shorten it, or write length: {most} in `calibration`, which cuts all rows there"
        raise SourceError(f"has {len(ids)} tokens, and the model takes {most} at most", place, fix)
    size = (config.get("text_config") or config).get("vocab_size")
    if isinstance(size, int) and max(ids) >= size:
        fix = "give ids of this model's tokens, or text; or write tokenizer: MODEL of one that has its tokens"
        raise SourceError(f"has the token {max(ids)}, and the model has {size}", place, fix)


def class_of_row(row: DataRow, config: Mapping[str, Any]) -> int | None:
    """The number of a row's class. Raises SourceError for one that the model's head does not have."""
    if row.label is None:
        return None
    names = {str(name): int(number) for name, number in (config.get("label2id") or {}).items()}
    numbers = {int(number) for number in config.get("id2label") or {}} or set(names.values()) or {0, 1}
    number = names.get(row.label) if isinstance(row.label, str) else row.label
    if number in numbers:
        return number
    known = ", ".join(names) if isinstance(row.label, str) else f"0 to {max(numbers)}"
    raise SourceError(f"its class {row.label!r} is outside the model's head", row.place, f"write one of: {known}")


def batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Examples of one length together, so that nothing is padded; short ones first."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda each: (each.length, tuple(each.inputs))):
        alike = bool(batch) and (batch[0].length, tuple(batch[0].inputs)) == (example.length, tuple(example.inputs))
        if batch and not (alike and example.length * (len(batch) + 1) <= BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
