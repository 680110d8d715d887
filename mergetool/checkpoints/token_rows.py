"""Which row of which model each row of a vocabulary is: matched by the text of tokens, never by their numbers.

A row that a model lacks is the one that a recipe names for its token, else that of the only model that has it, else the
base's, else the mean of all that have it. What nobody has is made up: zeros, a mean, or what the recipe asks for. Rows
without a token (padding) belong to the same number, where that has no token in the other model either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mergetool.checkpoints.vocabulary import Vocabulary
from mergetool.errors import PlanError

ZERO, MEAN, MIXED, DONATED, PADDING = -1, -2, -3, -4, -5
"""In place of a source: zeros; the mean of all own rows, or of some; made as a donor's is; the mean of all shown."""
DONATED_ROWS = "made of shared tokens"
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Part = tuple[int, int]
"""A source's place, and a row of it."""


@dataclass(frozen=True)
class RowRule:
    """Where the rows of one token come from, as a recipe says."""

    model: str | None = None
    token: str | None = None
    row: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class Wanted:
    """The vocabulary that every model is to show."""

    texts: Mapping[int, str]
    num_rows: int
    rules: Mapping[str, RowRule] = field(default_factory=dict)
    missing: str = "mean"
    leader: str | None = None
    """The base, whose rows go before a mean of several."""

    @cached_property
    def num_tokens(self) -> int:
        """Rows up to the last that has a token."""
        return max(self.texts, default=-1) + 1


@dataclass(frozen=True)
class RowMap:
    """Where each row of a tensor comes from, as one model shows it."""

    sources: tuple[str, ...]
    source: np.ndarray[Any, np.dtype[np.int16]]
    """For each row: a place in `sources`, or one of the numbers below zero."""
    row: Numbers
    mixed: Mapping[int, tuple[Part, ...]]
    """Parts of the rows that are means of some."""
    num_tokens: int
    own: int
    """The model itself among `sources`."""

    @property
    def made(self) -> bool:
        """Whether some rows are computed."""
        return bool((self.source < ZERO).any())

    def used(self) -> set[int]:
        """Places of all sources that are read."""
        return {int(each) for each in np.unique(self.source) if each >= 0} | {
            place for parts in self.mixed.values() for place, _ in parts
        }

    def counts(self) -> dict[str, int]:
        """How many rows come from where."""
        names = {ZERO: "zeros", MEAN: "mean of all rows", MIXED: "mean of several", DONATED: DONATED_ROWS}
        names[PADDING] = "padding"
        times = {int(each): int(count) for each, count in zip(*np.unique(self.source, return_counts=True), strict=True)}
        return {names.get(each, self.sources[each] if each >= 0 else ""): count for each, count in times.items()}

    def is_plain(self, rows: int) -> bool:
        """Whether these are the model's own rows in their own order."""
        whole = len(self.source) == rows and bool((self.source == self.own).all())
        return whole and bool((self.row == np.arange(rows)).all())


def row_maps(
    target: Wanted, vocabularies: Mapping[str, Vocabulary], rows: Mapping[str, int], where: str
) -> dict[str, RowMap]:
    """For every model that has a tensor (with so many `rows`), where the rows of that tensor come from.

    Raises PlanError for a rule that names a token or a row that is not there.
    """
    models = tuple(rows)
    places = {model: _places(target, vocabularies[model], rows[model]) for model in models}
    ruled = {
        number: (rule, _ruled(rule, text, models, vocabularies, rows, where))
        for number, text in target.texts.items()
        if (rule := target.rules.get(text)) is not None and number < target.num_rows
    }
    lacking = np.zeros(target.num_rows, bool)
    for own in places.values():
        lacking |= own < 0
    for number, (rule, _) in ruled.items():
        lacking[number] |= rule.force
    defaults = {int(number): _default(target, int(number), ruled, models, places) for number in np.flatnonzero(lacking)}
    return {
        model: _map_of(target, model, models, places[model], ruled, defaults, vocabularies, rows) for model in models
    }


def _places(target: Wanted, own: Vocabulary, rows: int) -> Numbers:
    """The model's own row for each row of the target, -1 where it has none."""
    places = np.full(target.num_rows, -1, np.int64)
    for number in range(target.num_rows):
        text = target.texts.get(number)
        if text is None:
            place = number if number not in own.texts else -1
        else:
            place = number if own.texts.get(number) == text else own.ids.get(text, -1)
        if place < rows:
            places[number] = place
    return places


def _ruled(
    rule: RowRule,
    text: str,
    models: Sequence[str],
    vocabularies: Mapping[str, Vocabulary],
    rows: Mapping[str, int],
    where: str,
) -> Part | None:
    """The row that a rule names, if it names one."""
    if rule.zero:
        return ZERO, 0
    if rule.model is None:
        return None
    place = f"tokenizer.tokens.{text}"
    if rule.model not in rows:
        raise PlanError(f"{rule.model!r} has no {where}, whose row is wanted", place, "name another model")
    token = text if rule.token is None else rule.token
    row = rule.row if rule.row is not None else vocabularies[rule.model].ids.get(token)
    if row is None:
        what = f"{rule.model!r} has no token {token!r}"
        raise PlanError(what, place, "name a token that it has: {from: MODEL, token: TEXT}")
    if row >= rows[rule.model]:
        what = f"row {row} is wanted, and {where} of {rule.model!r} has {rows[rule.model]}"
        raise PlanError(what, place, f"name a row below {rows[rule.model]}")
    return models.index(rule.model), row


_Ruled = Mapping[int, tuple[RowRule, Part | None]]
_Places = Mapping[str, Numbers]


def _default(
    target: Wanted, number: int, ruled: _Ruled, models: Sequence[str], places: _Places
) -> tuple[Part, ...] | None:
    """What stands in for the row in models that lack it; None where nobody has it."""
    part = ruled[number][1] if number in ruled else None
    if part is not None:
        return (part,)
    owners = [(place, int(places[model][number])) for place, model in enumerate(models) if places[model][number] >= 0]
    first = [each for each in owners if models[each[0]] == target.leader]
    return tuple(first or owners) or None


def _map_of(
    target: Wanted,
    model: str,
    models: tuple[str, ...],
    places: Numbers,
    ruled: _Ruled,
    defaults: Mapping[int, tuple[Part, ...] | None],
    vocabularies: Mapping[str, Vocabulary],
    rows: Mapping[str, int],
) -> RowMap:
    own = models.index(model)
    source = np.full(target.num_rows, own, np.int16)
    row = places.copy()
    mixed: dict[int, tuple[Part, ...]] = {}
    for number, default in defaults.items():
        forced = number in ruled and ruled[number][0].force
        if places[number] >= 0 and not forced:
            continue
        parts = default or _made_up(target, number, own, vocabularies[model], rows[model])
        if len(parts) == 1:
            source[number], row[number] = parts[0]
        else:
            source[number], row[number], mixed[number] = MIXED, 0, parts
    return RowMap(models, source, row, mixed, target.num_tokens, own)


def _made_up(target: Wanted, number: int, own: int, vocabulary: Vocabulary, rows: int) -> tuple[Part, ...]:
    """What a row is that no model has. Padding is the mean, which no text makes likely, as zeros might be."""
    text = target.texts.get(number)
    if text is None:
        return ((PADDING, 0),)
    if target.missing == "mean":
        return ((MEAN, 0),)
    if target.missing == "nearest":
        return tuple((own, row) for row in _pieces(text, vocabulary) if row < rows) or ((MEAN, 0),)
    return ((ZERO if target.missing == "zero" else DONATED, 0),)


def _pieces(text: str, own: Vocabulary) -> Iterator[int]:
    """Rows of the longest tokens that a text is made of, from its beginning on."""
    start = 0
    while start < len(text):
        ends = range(len(text), start, -1)
        end = next((end for end in ends if text[start:end] in own.ids), None)
        if end is not None:
            yield own.ids[text[start:end]]
        start = end or start + 1
