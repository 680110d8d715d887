"""Which tensor of a checkpoint is which of a planned result, whoever has written the checkpoint.

Other prefixes, experts fused or one by one, tied heads stored or left out, other files, other dtypes, another order of
tokens, and padding rows make no difference. What is left over on either side does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergetool.checkpoints.family import assemble
from mergetool.checkpoints.gathered import GatheredModel, vocabulary_axis
from mergetool.checkpoints.token_rows import ZERO, RowMap
from mergetool.checkpoints.view import RenamedModel
from mergetool.checkpoints.vocabulary import Vocabulary, chat_template_of, disagreement, tokens_of
from mergetool.checkpoints.vocabulary_axes import axes_of
from mergetool.engine.comparing import Opposite
from mergetool.layouts.stacking import is_buffer
from mergetool.planning import Plan
from mergetool.planning.inner import PlannedModel
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

_FREE = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "quantization_config"})
"""Keys of config.json that say nothing about the network."""
_RECIPE, _CHECKPOINT = "recipe", "checkpoint"


@dataclass
class Matched:
    """A checkpoint under the names of a result."""

    source: ModelSource
    places: dict[str, list[Opposite]] = field(default_factory=dict)
    """The tensors of the checkpoint that each output tensor is to be."""
    problems: list[str] = field(default_factory=list)
    """What makes it another checkpoint, before a weight is read."""
    remarks: list[str] = field(default_factory=list)


def matched(plan: Plan, found: ModelSource) -> Matched:
    """Lay a checkpoint beside a planned result. Raises SourceError for a checkpoint that contradicts itself."""
    planned = PlannedModel(plan)
    family = assemble({_RECIPE: planned, _CHECKPOINT: found}, _RECIPE, whole=True)
    wanted, there = family.sources[_RECIPE], family.sources[_CHECKPOINT]
    rows = _Rows(wanted, there)
    result = Matched(rows.shown(), problems=rows.problems, remarks=[*rows.remarks, *_beside(planned, found)])
    for name, spec in wanted.specs.items():
        if name in result.source.specs:
            _pair(result, wanted, name, spec, rows.skipped.get(name))
    lacks = [name for name in wanted.specs if name not in there.specs]
    more = [name for name in there.specs if name not in wanted.specs]
    for names, verb in ((lacks, "lacks"), (more, "has, and the recipe does not make,")):
        _leftover(result, names, verb)
    return result


def _pair(
    result: Matched,
    wanted: ModelSource,
    name: str,
    spec: TensorSpec,
    skipped: np.ndarray[Any, np.dtype[np.bool_]] | None,
) -> None:
    there = result.source.specs[name]
    if there.shape != spec.shape:
        result.problems.append(f"{name} is {list(there.shape)} here, {list(spec.shape)} by the recipe")
    elif there.dtype != spec.dtype and not (there.dtype.is_float and spec.dtype.is_float):
        result.problems.append(f"{name} is {there.dtype.name} here, {spec.dtype.name} by the recipe")
    else:
        own = wanted.stored[name] if isinstance(wanted, RenamedModel) else name
        result.places.setdefault(own, []).append(Opposite(name, skipped))


def _leftover(result: Matched, names: Sequence[str], verb: str) -> None:
    """Tensors on one side only: buffers that libraries make anew are worth a word, all others a no."""
    for kept, told in ((False, result.problems), (True, result.remarks)):
        chosen = [name for name in names if is_buffer(name) == kept]
        if chosen:
            kind = "buffers that libraries make anew" if kept else "tensors"
            more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
            told.append(f"it {verb} {len(chosen)} {kind}: {', '.join(chosen[:3])}{more}")


class _Rows:
    """The rows of tokens, where the checkpoint has them in another order, or another number of them."""

    def __init__(self, wanted: ModelSource, there: ModelSource) -> None:
        self._wanted, self._there = wanted, there
        self.skipped: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self.problems: list[str] = []
        self.remarks: list[str] = []

    def shown(self) -> ModelSource:
        """The checkpoint with its rows in the order of the result."""
        ours, theirs = (tokens_of(source.tokenizer_folder) for source in (self._wanted, self._there))
        differ = disagreement(self._wanted.tokenizer_folder, self._there.tokenizer_folder)
        if differ is not None:
            self.remarks.append(f"the tokens stand in another order: {differ}")
        ours, theirs = ours or theirs, theirs or ours
        if ours is None or theirs is None:
            return self._there
        self._tell_lost(ours, theirs)
        maps = dict(self._maps(ours, Vocabulary(theirs), moved=differ is not None))
        return GatheredModel(self._there, maps, {_CHECKPOINT: self._there}) if maps else self._there

    def _tell_lost(self, ours: Mapping[int, str], theirs: Mapping[int, str]) -> None:
        here, there = set(ours.values()), set(theirs.values())
        for lost, verb in ((here - there, "lacks"), (there - here, "has, and the recipe's result lacks,")):
            if lost:
                self.problems.append(f"it {verb} {len(lost)} tokens, such as {min(lost)!r}")

    def _maps(self, ours: Mapping[int, str], theirs: Vocabulary, *, moved: bool) -> Iterator[tuple[str, RowMap]]:
        for name in axes_of(self._wanted):
            if name not in self._there.specs:
                continue
            shapes = [list(source.specs[name].shape) for source in (self._wanted, self._there)]
            axis = vocabulary_axis(self._wanted.specs[name].shape)
            wanted, held = (shape.pop(axis) for shape in shapes)
            if shapes[0] == shapes[1] and (moved or wanted != held):
                yield name, self._map(name, wanted, held, ours, theirs)

    def _map(self, name: str, wanted: int, held: int, ours: Mapping[int, str], theirs: Vocabulary) -> RowMap:
        """Where each row of the result is in the checkpoint; padding is passed over."""
        row = np.full(wanted, -1, np.int64)
        for number, text in ours.items():
            place = theirs.ids.get(text, -1)
            if number < wanted and place < held:
                row[number] = place
        if wanted != held:
            self.remarks.append(f"{name} has {held} rows here, {wanted} by the recipe: rows of tokens are compared")
        skipped = self.skipped[name] = row < 0
        source = np.where(skipped, ZERO, 0).astype(np.int16)
        return RowMap((_CHECKPOINT,), source, np.where(skipped, 0, row), {}, len(ours), 0)


def _beside(planned: ModelSource, found: ModelSource) -> Iterator[str]:
    """How config.json and the chat template differ from those of the result."""
    if found.folder is None:
        return
    ours, theirs = read_config(planned.folder), read_config(found.folder)
    differing = [key for key in ours.keys() & theirs.keys() - _FREE if ours[key] != theirs[key]]
    if differing:
        told = ", ".join(f"{key} is {theirs[key]!r}, not {ours[key]!r}" for key in sorted(differing)[:3])
        yield f"config.json differs in {len(differing)} keys: {told}"
    templates = [chat_template_of(source.folder) for source in (planned, found)]
    if None not in templates and templates[0] != templates[1]:
        yield "the chat template is another one"
