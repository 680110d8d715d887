"""One checkpoint under the vocabulary of another, for comparing the two: rows are matched by the text of tokens."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from mergetool.checkpoints.gathered import GatheredModel, vocabulary_axis
from mergetool.checkpoints.token_rows import ZERO, RowMap
from mergetool.checkpoints.vocabulary import Vocabulary, disagreement, tokens_of
from mergetool.checkpoints.vocabulary_axes import axes_of
from mergetool.tensors.source import ModelSource

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""For each row of a tensor, whether it is meant."""
_SECOND = "second"


class OtherRows:
    """What two vocabularies have to do with each other, and `shown`, the second checkpoint under the first one's."""

    def __init__(self, first: ModelSource, second: ModelSource) -> None:
        self._first, self._second = first, second
        self.order = disagreement(first.tokenizer_folder, second.tokenizer_folder)
        """How numbers of tokens differ; None where they do not."""
        self.lacked: list[str] = []
        """Tokens that only the first has."""
        self.more: list[str] = []
        """Tokens that only the second has."""
        self.sizes: dict[str, tuple[int, int]] = {}
        """Tensors with another number of rows, and these numbers."""
        self.rowless: dict[str, int] = {}
        """Tensors of the second in which so many tokens have no row, though the first has one."""
        self.skipped: dict[str, Rows] = {}
        """Rows that cannot be compared."""
        self.shown = self._shown()

    def _shown(self) -> ModelSource:
        ours, theirs = (tokens_of(source.tokenizer_folder) for source in (self._first, self._second))
        ours, theirs = ours or theirs, theirs or ours
        if ours is None or theirs is None:
            return self._second
        here, there = set(ours.values()), set(theirs.values())
        self.lacked, self.more = sorted(here - there), sorted(there - here)
        maps = dict(self._maps(ours, Vocabulary(theirs)))
        return GatheredModel(self._second, maps, {_SECOND: self._second}) if maps else self._second

    def _maps(self, ours: Mapping[int, str], theirs: Vocabulary) -> Iterator[tuple[str, RowMap]]:
        for name in axes_of(self._first):
            if name not in self._second.specs:
                continue
            shapes = [list(source.specs[name].shape) for source in (self._first, self._second)]
            axis = vocabulary_axis(self._first.specs[name].shape)
            wanted, held = (shape.pop(axis) for shape in shapes)
            if shapes[0] == shapes[1] and (self.order is not None or wanted != held):
                yield name, self._map(name, wanted, held, ours, theirs)

    def _map(self, name: str, wanted: int, held: int, ours: Mapping[int, str], theirs: Vocabulary) -> RowMap:
        """Where each row of the first is in the second; padding is passed over."""
        row = np.full(wanted, -1, np.int64)
        for number, text in ours.items():
            if number < wanted and text in theirs.ids:
                row[number] = theirs.ids[text]
        if lost := int((row >= held).sum()):
            self.rowless[name] = lost
        row[row >= held] = -1
        if wanted != held:
            self.sizes[name] = wanted, held
        skipped = self.skipped[name] = row < 0
        source = np.where(skipped, ZERO, 0).astype(np.int16)
        return RowMap((_SECOND,), source, np.where(skipped, 0, row), {}, len(ours), 0)
