"""The layers of one row, put on each other: of which tensors of the models each tensor of a slice is made.

Refused are layers that the result's network cannot hold: numbers that a model has not, tensors that no layer of its own
has, a first layer that is unlike all others in another place.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergetool.checkpoints.rows import layers_of, norms_not_in_first, of_first_layer
from mergetool.checkpoints.truth import kinds_of_layers, layers_behind
from mergetool.errors import PlanError
from mergetool.layouts.base import Origin, Sources
from mergetool.layouts.slice import Slice
from mergetool.tensors.side_files import read_config

_BASE = "base"
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.\w+|(attn|attention)\.(masked_)?bias|position_ids)")
"""What old files hold of a layer besides its weights."""


def is_buffer(name: str) -> bool:
    """Whether a tensor is none of the network's weights: libraries make it anew, and leave it out when they save."""
    return _BUFFERS.fullmatch(name) is not None


@dataclass(frozen=True)
class Placed:
    """A slice, and which of the layout's overrides are its own."""

    slice: Slice
    settings: tuple[int, ...]


class StackedRow:
    """One row of layers, as all models have it."""

    def __init__(self, sources: Sources, leader: str, tower: str) -> None:
        self.sources, self.leader, self.tower = sources, leader, tower
        self._layers: dict[str, dict[int, dict[str, str]]] = {}
        self._first: dict[str, set[str]] = {}
        self._lacked: dict[str, set[str]] = {}
        """Norms that the first layer of a model lacks, and all others have."""
        self._attention: dict[str, list[str | None]] = {}
        self._mixed: list[str] = []
        self._kinds: list[frozenset[str]] | None = None

    def layers(self, model: str) -> dict[int, dict[str, str]]:
        """The tensors of each layer of a model, by what stands behind the number."""
        if model not in self._layers:
            numbered = layers_of(self.sources[model].specs, self.tower)
            count = len(numbered) - layers_behind(read_config(self.sources[model].folder), len(numbered))
            self._layers[model] = {number: own for number, own in numbered.items() if number < count}
            self._first[model] = of_first_layer(self._layers[model])
            self._lacked[model] = norms_not_in_first(self._layers[model])
            config = read_config(self.sources[model].folder)
            self._attention[model] = kinds_of_layers(config, self.tower, count)
        return self._layers[model]

    def stacked(self, stack: Sequence[Placed]) -> Iterator[Origin]:
        """The tensors of every layer."""
        places = [(placed, offset) for placed in stack for offset in range(placed.slice.length)]
        for number, (placed, offset) in enumerate(places):
            yield from self._layer(placed, offset, number)

    def _layer(self, placed: Placed, offset: int, number: int) -> Iterator[Origin]:
        """The tensors of one layer of the output."""
        each, leading = placed.slice, placed.slice.models[0]
        alone = each.is_of_one and not placed.settings
        numbers = self._numbers(each, offset, alone=alone)
        self._note_kinds({name: layer for name, layer in numbers.items() if name in each.models}, number)
        self._check_norms(leading, numbers[leading] or 0, number)
        own = self.layers(leading)[numbers[leading] or 0]
        shared = self._first[leading]
        self._check_tensors(leading, numbers[leading] or 0, own.keys() - shared)
        inside = sorted(own.keys() - shared, key=lambda suffix: self.sources[leading].position(own[suffix]))
        for suffix in [*inside, *sorted(shared if number == 0 else ())]:
            places = dict.fromkeys(numbers, 0) if suffix in shared else numbers
            tensors = {model: f"{self.tower}.{layer}.{suffix}" for model, layer in places.items() if layer is not None}
            yield Origin(
                f"{self.tower}.{number}.{suffix}",
                having(self.sources, tensors, each.own_base),
                each.models,
                copy_of=leading if alone else None,
                settings=placed.settings,
                within=each.depth(offset),
                base=each.own_base,
            )

    def _numbers(self, each: Slice, offset: int, *, alone: bool) -> dict[str, int | None]:
        """The layer of each model, and of the base under its name, that goes into one of the output."""
        numbers = {name: each.layer(name, offset) for name in each.models}
        for name, layer in numbers.items():
            self._check(name, layer)
        if _BASE not in self.sources or _BASE in numbers:
            return numbers
        numbers[_BASE] = layer = each.base_layer(offset)
        if layer is None and not alone:
            what = f"{' and '.join(each.models)} give layers of other numbers, and which are the base's is not said"
            raise PlanError(what, f"slices: {dict(each.layers)}", "add base: [first, end] to the slice")
        if not alone:
            self._check(each.own_base, layer)
        return numbers

    @property
    def words(self) -> tuple[str, ...]:
        """What people should know of the layers that are merged."""
        more = f", and {len(self._mixed) - 1} more are so" if len(self._mixed) > 1 else ""
        fix = "shift a slice so that its models' layers are of one kind"
        return (f"{self._mixed[0]}{more}: {fix}",) if self._mixed else ()

    def _note_kinds(self, numbers: Mapping[str, int | None], number: int) -> None:
        """Layers that look at a window, merged with layers that see everything: a mean of the two is neither."""
        kinds = {name: self._attention[name][layer] for name, layer in numbers.items() if layer is not None}
        if len({kind for kind in kinds.values() if kind}) > 1:
            told = " and ".join(f"layer {numbers[name]} of {name} ({kind})" for name, kind in kinds.items())
            self._mixed.append(f"layer {number} of {self.tower} is merged from {told}, and is of the first one's kind")

    def _check_tensors(self, model: str, layer: int, own: Iterable[str]) -> None:
        """The result is the leader's network, and each layer of it holds what some layer of the leader holds."""
        kinds, own = self._kinds_of_leader(), _weights(own)
        if model == self.leader or not kinds or own in kinds:
            return
        nearest = min(kinds, key=lambda kind: len(kind ^ own))
        more, less = sorted(own - nearest), sorted(nearest - own)
        told = [f"has {more[0]}, which it lacks"] if more else [f"lacks {less[0]}, which it has"]
        what = f"layer {layer} of model {model!r} is like no layer of {_label(self.leader)}: it {told[0]}"
        raise PlanError(what, f"slices: {model}", "stack layers of models of one architecture")

    def _kinds_of_leader(self) -> list[frozenset[str]]:
        """The sets of tensors that layers of the leader hold; none where nothing says what its network is."""
        if not read_config(self.sources[self.leader].folder):
            return []
        if self._kinds is None:
            kinds = [_weights(own.keys() - self._first_of(self.leader)) for own in self.layers(self.leader).values()]
            self._kinds = list(dict.fromkeys(kinds))
        return self._kinds

    def _first_of(self, model: str) -> set[str]:
        self.layers(model)
        return self._first[model]

    def _check_norms(self, model: str, layer: int, number: int) -> None:
        """A first layer without a norm that all others have (ModernBERT) can neither leave its place nor yield it."""
        if self._lacked[model] and (layer == 0) != (number == 0):
            what = f"layer 0 of model {model!r} has no {min(self._lacked[model])}, and layer 0 of the result has none"
            count = len(self.layers(model))
            fix = f"begin with layer 0 of a model, and take it nowhere else: [0, ..] first, then [1, {count}]"
            raise PlanError(what, f"slices: layer {number} of {self.tower}", fix)

    def _check(self, model: str, layer: int | None) -> None:
        count = len(self.layers(model))
        if layer is not None and layer not in self.layers(model):
            what = f"layer {layer} is asked for, and {_label(model)} has layers 0 to {count - 1} ({self.tower})"
            raise PlanError(what, f"slices: {model}", f"write at most [.., {count}]")


def _label(model: str) -> str:
    """What messages call a model."""
    return "the base" if model == _BASE else f"model {model!r}"


def _weights(suffixes: Iterable[str]) -> frozenset[str]:
    return frozenset(each for each in suffixes if not is_buffer(each))


def having(sources: Sources, tensors: Mapping[str, str], base: str) -> dict[str, str]:
    """The tensors that there are, those of the slice's base under "base"."""
    holders = {model: base if model == _BASE else model for model in tensors}
    return {
        model: name
        for model, name in tensors.items()
        if holders[model] in sources and name in sources[holders[model]].specs
    }
