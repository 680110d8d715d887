"""Several checkpoints of one network, seen under one set of names.

The leader's names lead (the base's, or the first model's), without what training wrapped them in. Of every other model
each tensor is found under its own name (`names.py`). Then ties: where one model has a head of its own and another ties
its head to its embeddings, those embeddings are that other model's head, too; a copy that the leader does not store is
left out where all models tie it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergetool.checkpoints.experts import in_layout_of
from mergetool.checkpoints.names import Shapes, match, repeated, unwrapped
from mergetool.checkpoints.ties import holds_the_same, is_head, may_be_tied, ties_words, twin_of
from mergetool.checkpoints.view import RenamedModel
from mergetool.errors import SourceError
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

Names = dict[str, dict[str, str]]
"""By model: what its file calls a tensor, by the family's name for it."""


@dataclass(frozen=True)
class Family:
    """Models under one set of names."""

    sources: Mapping[str, ModelSource]
    twins: Mapping[str, str] = field(default_factory=dict)
    """Names whose tensor is another name's in every model, with that name."""
    untied: tuple[str, ...] = ()
    """Heads that the leader ties to its embeddings, and another model does not."""
    remarks: tuple[str, ...] = ()


def assemble(sources: Mapping[str, ModelSource], leader: str, *, whole: bool = False) -> Family:
    """See every model under the leader's names. With `whole`, tied copies are compared to the last byte."""
    sources = {
        model: source if model == leader else in_layout_of(source, sources[leader].specs)
        for model, source in sources.items()
    }
    stored: Names = {leader: _inverted(unwrapped(sources[leader].specs))}
    known: Shapes = {name: sources[leader].specs[own].shape for name, own in stored[leader].items()}
    for model, source in sources.items():
        if model != leader:
            shapes: Shapes = {name: spec.shape for name, spec in source.specs.items()}
            stored[model] = _inverted(match(shapes, known))
            _drop_repeated(source, model, stored[model], known)
            known = {name: shapes[own] for name, own in stored[model].items()} | dict(known)
    remarks = _wrapped(leader, stored[leader])
    tied = [name for name in known if may_be_tied(name)]
    if not tied:
        return Family(_views(sources, stored), remarks=remarks)
    before = set(stored[leader])
    twins, untied = _tie(sources, stored, leader, tied, whole=whole)
    torn = [name for name in untied if name not in before]
    remarks += tuple(
        f"{name} is no longer tied: not all models tie it, so it becomes a tensor of its own" for name in torn
    )
    return Family(_views(sources, stored), twins, untied, remarks)


def _inverted(names: Mapping[str, str]) -> dict[str, str]:
    return {name: own for own, name in names.items()}


def _views(sources: Mapping[str, ModelSource], stored: Mapping[str, Mapping[str, str]]) -> dict[str, ModelSource]:
    """The sources themselves where no name changes."""
    return {
        model: source
        if all(name == own for name, own in stored[model].items()) and len(stored[model]) == len(source.specs)
        else RenamedModel(source, stored[model])
        for model, source in sources.items()
    }


def _wrapped(leader: str, stored: Mapping[str, str]) -> tuple[str, ...]:
    changed = [(own, name) for name, own in stored.items() if own != name]
    if not changed:
        return ()
    own, name = changed[0]
    whose = "the base" if leader == "base" else f"model {leader!r}"
    return (f"{len(changed)} tensors of {whose} are written without what training wrapped them in: {own} as {name}",)


def _tie(
    sources: Mapping[str, ModelSource], stored: Names, leader: str, tied: Sequence[str], *, whole: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give every model the second names of its tensors that others store, and leave out copies that nobody needs.

    Returns names that are one with another in every model, and those that the leader alone thinks are.
    """
    configs = {model: read_config(source.folder) for model, source in sources.items()}
    views = {model: RenamedModel(source, stored[model]) for model, source in sources.items()}
    leads, tying = set(stored[leader]), ties_words(configs[leader])
    same: dict[str, str] = {}
    renamed: set[tuple[str, str]] = set()
    for name in sorted(tied, key=is_head, reverse=True):
        twins = {model: _twin(views[model], name, configs[model], whole=whole) for model in sources}
        torn = _weight_of(name) in stored[leader] and _weight_of(name) not in same  # nothing ties the bias alone
        if (target := _shared(twins, name, stored)) and (name in leads or not torn):
            same[name] = target
        for model, twin in twins.items():
            _name_twice(stored[model], name, twin, leads=name in leads, same=name in same)
            if twin is not None and name in leads and twin not in leads and (tying or not is_head(name)):
                renamed.add((model, twin))  # the leader stores this tensor under its second name only
    for model, twin in renamed:
        del stored[model][twin]
    untied = tuple(name for name in tied if tying and name not in same and is_head(name) and name in stored[leader])
    return {name: target for name, target in same.items() if name in leads and target in leads}, untied


def _shared(twins: Mapping[str, str | None], name: str, stored: Names) -> str | None:
    """The tensor that a name is a second name of in every model that knows it; None if it is not one in all."""
    targets = {twin for model, twin in twins.items() if twin or name in stored[model]}
    return targets.pop() if len(targets) == 1 else None


def _name_twice(stored: dict[str, str], name: str, twin: str | None, *, leads: bool, same: bool) -> None:
    """Have a model know a tensor by its second name where the result needs it, and only there."""
    if twin is not None and name not in stored and (leads or not same):
        stored[name] = stored[twin]
    if same and not leads:
        stored.pop(name, None)


def _weight_of(name: str) -> str:
    """The weight of the head that a tensor is the bias of; of any other tensor, no name at all."""
    weight = f"{name.removesuffix('.bias')}.weight"
    return weight if name.endswith(".bias") and is_head(weight) else ""


def _drop_repeated(source: ModelSource, model: str, stored: dict[str, str], known: Shapes) -> None:
    """Leave out what a file holds twice, under names of one tensor. Raises SourceError where the two differ."""
    extra = [name for name in stored if name not in known]
    words = read_config(source.folder).get("model_type")
    for name, other in repeated(extra, known, words=(str(words),)).items():
        if other not in stored or source.specs[stored[other]].shape != source.specs[stored[name]].shape:
            continue
        if not holds_the_same(source, stored[name], stored[other], whole=True):
            what = f"holds one tensor twice, with other values: {stored[other]} and {stored[name]}"
            raise SourceError(what, f"model {model!r}: {source.folder}", "remove the one that is not meant")
        del stored[name]


def _twin(view: RenamedModel, name: str, config: Mapping[str, object], *, whole: bool) -> str | None:
    """The tensor that a name of this model is a second name of, if the file does not say otherwise."""
    target = twin_of(name, view.specs, config)
    if target is not None and name in view.specs and not holds_the_same(view, name, target, whole=whole):
        return None
    return target
