"""Which tensor of a checkpoint is which of a planned result, whoever has written the checkpoint.

Other prefixes, experts fused or one by one, tied heads stored or left out, other files, other dtypes, another order of
tokens, and padding rows make no difference. What is left over on either side does.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from mergetool.checkpoints.family import assemble
from mergetool.checkpoints.other_rows import OtherRows, Rows
from mergetool.checkpoints.view import RenamedModel
from mergetool.checkpoints.vocabulary import chat_template_of, tokens_of
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
    unordered: Collection[str] = ()
    """Tensors whose rows are tokens in an order that nothing tells."""


def matched(plan: Plan, found: ModelSource) -> Matched:
    """Lay a checkpoint beside a planned result. Raises SourceError for a checkpoint that contradicts itself."""
    planned = PlannedModel(plan)
    family = assemble({_RECIPE: planned, _CHECKPOINT: found}, _RECIPE, whole=True)
    wanted, there = family.sources[_RECIPE], family.sources[_CHECKPOINT]
    rows = OtherRows(wanted, there)
    remarks = [*_words_about_rows(rows), *_beside(planned, found)]
    result = Matched(rows.shown, problems=[*_lost_tokens(rows)], remarks=remarks)
    if plan.words.texts is not None and tokens_of(found.tokenizer_folder) is None:
        result.unordered = plan.words.rows.keys()
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
    skipped: Rows | None,
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


def _lost_tokens(rows: OtherRows) -> Iterator[str]:
    for tokens, verb in ((rows.lacked, "lacks"), (rows.more, "has, and the recipe's result lacks,")):
        if tokens:
            yield f"it {verb} {len(tokens)} tokens, such as {tokens[0]!r}"
    for name, count in rows.rowless.items():
        yield f"{name} has no rows for {count} tokens"


def _words_about_rows(rows: OtherRows) -> Iterator[str]:
    if rows.order is not None:
        yield f"the tokens stand in another order: {rows.order}"
    for name, (wanted, held) in rows.sizes.items():
        yield f"{name} has {held} rows here, {wanted} by the recipe: rows of tokens are compared"


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
