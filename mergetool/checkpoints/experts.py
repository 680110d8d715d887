"""Experts of a mixture stored one by one, or fused into one tensor a layer: each layout seen as the other.

    experts.E.gate_proj.weight (w1), experts.E.up_proj.weight (w3)  <->  experts.gate_up_proj   (experts, 2 ffn, hidden)
    experts.E.down_proj.weight (w2)                                 <->  experts.down_proj      (experts, hidden, ffn)

Both lay the same bytes in the same order, so a slice of the one is a few slices of the other, and nothing is copied.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergetool.checkpoints.view import RenamedModel
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import ModelSource

_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_LEAVES = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}


@dataclass(frozen=True)
class _Part:
    """Bytes [begin, begin + length) of a stored tensor."""

    own: str
    begin: int
    length: int


class _Regrouped(RenamedModel):
    """A model of which some tensors are cut from, or put together of, stored ones."""

    def __init__(self, model: ModelSource, specs: Mapping[str, TensorSpec], parts: Mapping[str, list[_Part]]) -> None:
        used = {part.own for of_tensor in parts.values() for part in of_tensor}
        super().__init__(model, {name: name for name in model.specs if name not in used})
        self._parts = parts
        self.specs = {**self.specs, **specs}
        self.stored = {**self.stored, **{name: of_tensor[0].own for name, of_tensor in parts.items()}}

    @property
    def described(self) -> Mapping[str, TensorSpec]:
        return self.specs

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if name not in self._parts:
            super().read_bytes(name, begin, buffer)
            return
        place, end = 0, begin + len(buffer)
        for part in self._parts[name]:
            first, last = max(begin, place), min(end, place + part.length)
            if first < last:
                target = buffer[first - begin : last - begin]
                self.model.read_bytes(part.own, part.begin + first - place, target)
            place += part.length

    def position(self, name: str) -> tuple[int, int]:
        index, offset = super().position(name)
        return index, offset + (self._parts[name][0].begin if name in self._parts else 0)

    def will_need(self, name: str, begin: int, length: int) -> None:
        if name not in self._parts:
            super().will_need(name, begin, length)


def fused_name(name: str) -> str:
    """What a tensor of an expert, or of what chooses among them, is called where experts are fused; else its name."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    match = _SINGLE.fullmatch(name)
    if match is None:
        return name
    leaf = next(leaf for leaf, names in _LEAVES.items() if any(match[3] in each for each in names))
    return f"{match[1]}.{leaf}"


def in_layout_of(model: ModelSource, leader: Mapping[str, TensorSpec]) -> ModelSource:
    """`model` with its experts fused, or one by one, as `leader` has them."""
    fused = any(_FUSED.fullmatch(name) for name in leader)
    single = next((match for name in leader if (match := _SINGLE.fullmatch(name))), None)
    if fused and not single and any(_SINGLE.fullmatch(name) for name in model.specs):
        return _fused(model)
    if single and not fused and any(_FUSED.fullmatch(name) for name in model.specs):
        return _split(model, short=single[3].startswith("w"))
    return model


def _fused(model: ModelSource) -> ModelSource:
    layers: dict[str, dict[int, dict[str, str]]] = {}
    for name in model.specs:
        if match := _SINGLE.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
    parts: dict[str, list[_Part]] = {}
    specs = {}
    for layer, experts in layers.items():
        for kind, leaves in _LEAVES.items():
            names = [
                next((experts[expert][leaf] for leaf in wanted if leaf in experts[expert]), "")
                for expert in sorted(experts)
                for wanted in leaves
            ]
            pieces = [model.specs[name] for name in names if name]
            if len(pieces) < len(names) or len({(spec.shape, spec.dtype) for spec in pieces}) != 1:
                return model
            rows, columns = pieces[0].shape
            fused = f"{layer}.{kind}"
            specs[fused] = TensorSpec(fused, pieces[0].dtype, (len(experts), len(leaves) * rows, columns))
            parts[fused] = [_Part(spec.name, 0, spec.num_bytes) for spec in pieces]
    return _Regrouped(model, specs, parts)


def _split(model: ModelSource, *, short: bool) -> ModelSource:
    parts: dict[str, list[_Part]] = {}
    specs = {}
    for name, spec in model.specs.items():
        match = _FUSED.fullmatch(name)
        if match is None or len(spec.shape) != 3:
            continue
        leaves = [wanted[1 if short else 0] for wanted in _LEAVES[match[2]]]
        shape = (spec.shape[1] // len(leaves), spec.shape[2])
        for place in range(spec.shape[0] * len(leaves)):
            own = f"{match[1]}.{place // len(leaves)}.{leaves[place % len(leaves)]}.weight"
            specs[own] = TensorSpec(own, spec.dtype, shape)
            parts[own] = [_Part(name, place * specs[own].num_bytes, specs[own].num_bytes)]
    return _Regrouped(model, specs, parts)
