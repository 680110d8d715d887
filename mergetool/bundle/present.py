"""Classifiers as transformers saves them, on their way into a bundle: what is the base's, and what is each one's own.

    shared   what the base and every expert have: kept as factors, under the base's names
    own      what only the expert has (classifier, pooler, whatever its class needs): kept whole, under its own names

The pooler is an expert's own even where the base has one: it is trained with the classifier. A base that is a
classifier itself has a head of its own, which no expert shares, whatever its tensors are called.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.arch.heads import HeadKind, embeds, head_kind, is_general, is_pooler
from mergetool.checkpoints.adapters import AdapterSource
from mergetool.checkpoints.adapters.places import TASK_HEADS
from mergetool.checkpoints.names import match
from mergetool.checkpoints.view import RenamedModel
from mergetool.errors import PlanError
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

BASE = "base"
_ENOUGH = 0.5
"""Share of an expert's tensors that must be the base's."""


@dataclass(frozen=True)
class OwnHead:
    """A classifier inside an expert's checkpoint."""

    source: ModelSource
    """The whole checkpoint, under its own names."""
    architecture: str
    kind: HeadKind
    names: tuple[str, ...]
    """Tensors that are the expert's own."""
    layout: Mapping[str, str]
    """Names in the base by name in the expert, of all others."""

    @property
    def folder(self) -> Path:
        assert self.source.folder is not None  # it has a config.json
        return self.source.folder


class PresentedSource(RenamedModel):
    """A model seen under the base's names, and no more of it than these."""

    def __init__(self, source: ModelSource, names: Mapping[str, str], head: OwnHead | None = None) -> None:
        """`names`: what the source calls a tensor, by what it is to be called."""
        super().__init__(source, names)
        self.head = head


def present(sources: Mapping[str, ModelSource], explicit: Collection[str]) -> dict[str, ModelSource]:
    """The models as a bundle's build sees them; as they are, where no expert is a classifier of transformers.

    `explicit`: experts whose heads the recipe names. Raises PlanError for experts of a kind that cannot be kept, for
    one without a head among others, and for one that is no fine-tune of the base.
    """
    experts = {name: source for name, source in sources.items() if name != BASE}
    architectures = {name: _architecture(source) for name, source in experts.items()}
    plain = [name for name in experts if name not in explicit]
    for name in plain:
        _check_adapter(name, architectures[name], experts[name])
        _check_kind(name, architectures[name], experts[name], sources[BASE])
    kinds = {name: head_kind(architectures[name]) for name in plain}
    if not any(kinds.values()):
        return dict(sources)
    without = [name for name in plain if kinds[name] is None]
    if without:
        other = next(name for name in experts if name not in without)
        what = f"task {without[0]!r} has no head that can be found, but {other!r} has"
        named = f"its config.json names {architectures[without[0]] or 'no architecture'}"
        fix = f"save it as a ...ForSequenceClassification, or add head: {{weights: PATH}} to model {without[0]!r}"
        raise PlanError(f"{what}; {named}", f"model {without[0]!r}", fix)
    return _presented(sources, architectures, kinds)


def _presented(
    sources: Mapping[str, ModelSource], architectures: Mapping[str, str], kinds: Mapping[str, HeadKind | None]
) -> dict[str, ModelSource]:
    base = sources[BASE]
    base_class = _architecture(base)
    with_head = base_class != "" and not is_general(base_class)
    met = {}
    for name, source in sources.items():
        if name != BASE:
            own_of = counterparts(base, source)
            _check_met(name, architectures[name], source, base_class, len(own_of))
            met[name] = _without_heads(own_of, source, with_head=with_head)
    shared = [name for name in base.specs if any(name in names for names in met.values())]
    presented: dict[str, ModelSource] = {BASE: PresentedSource(base, {name: name for name in shared})}
    for task, names in met.items():
        head = None
        if kind := kinds.get(task):
            layout = {own: name for name, own in names.items()}
            own_names = _with_neighbours([name for name in sources[task].specs if name not in layout], sources[task])
            head = OwnHead(sources[task], architectures[task], kind, own_names, layout)
        presented[task] = PresentedSource(sources[task], names, head)
    return {name: presented[name] for name in sources}


def _without_heads(own_of: Mapping[str, str], source: ModelSource, *, with_head: bool) -> dict[str, str]:
    """What is left of the base's tensors that an expert has, without poolers and the head of a base that has one."""
    counted = Counter(own.partition(".")[0] for own in source.specs)
    main = counted.most_common(1)[0][0]
    return {
        name: own
        for name, own in own_of.items()
        if not is_pooler(own) and not (with_head and own.partition(".")[0] != main and not embeds(own))
    }


def _with_neighbours(own: Iterable[str], source: ModelSource) -> tuple[str, ...]:
    """Own tensors, and those that lie directly in a module on the way to one: such a module is run again for it."""
    modules = {module for name in own for module in _modules_on_the_way(name)}
    wanted = {*own, *(name for name in source.specs if name.rpartition(".")[0] in modules)}
    return tuple(sorted(wanted, key=source.position))


def _modules_on_the_way(name: str) -> list[str]:
    """The modules that hold a tensor, the outermost (the model itself, an empty path) first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _architecture(source: ModelSource) -> str:
    """The class that a checkpoint's config names, or an empty string."""
    config: dict[str, Any] = read_config(source.folder)
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _check_kind(name: str, architecture: str, source: ModelSource, base: ModelSource) -> None:
    """Refuse a head that cannot be kept, rather than leave it out."""
    if not architecture or head_kind(architecture) is not None or is_general(architecture):
        return
    met = counterparts(base, source)
    own = sorted(set(source.specs) - set(met.values()))
    if own:
        what = f"it is a {architecture}, whose head ({own[0]}, ...) a bundle cannot keep"
        fix = "give a classifier of sequences, images, audio, video or tokens, or a question answering model"
        raise PlanError(what, f"model {name!r}", fix)


def _check_adapter(name: str, architecture: str, source: ModelSource) -> None:
    """Refuse an adapter's head where nothing says of which class it is, rather than leave it out."""
    added = sorted(source.added) if isinstance(source, AdapterSource) and head_kind(architecture) is None else []
    heads = [own for own in added if TASK_HEADS & set(own.split("."))]
    if heads:
        what = f"its adapter brings a head, {heads[0]}, and config.json of the model beneath names a class without one"
        fix = "name the class that was trained, e.g. save the base by AutoModelForSequenceClassification, as base"
        raise PlanError(f"{what}: {architecture or 'none'}", f"model {name!r}", fix)


def _check_met(name: str, architecture: str, source: ModelSource, base: str, met: int) -> None:
    if met < _ENOUGH * len(source.specs):
        kinds = f"a {architecture or 'model'} and the base a {base or 'model of another kind'}"
        what = f"only {met} of its {len(source.specs)} tensors are in the base: it is {kinds}"
        raise PlanError(what, f"model {name!r}", "give the model that it was fine-tuned from as base")


def counterparts(base: ModelSource, expert: ModelSource) -> dict[str, str]:
    """The expert's name of every tensor of the base that it has."""
    ours = {name: spec.shape for name, spec in base.specs.items()}
    theirs = {name: spec.shape for name, spec in expert.specs.items()}
    return {name: own for own, name in match(theirs, ours).items() if name in ours}
