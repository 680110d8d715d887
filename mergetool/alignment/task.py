"""What is to be aligned: the models of a run, their architecture, and the numeric problem they pose.

The models enter in an order that follows from their contents, so that the order in which a recipe lists them decides
nothing. Weights are read when they are needed; those of small models stay in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mergetool.alignment.activations import most_said, said
from mergetool.alignment.options import WEIGHTS, MatchBy
from mergetool.arch.bind import architectures
from mergetool.arch.spec import ArchSpec, check_shapes
from mergetool.errors import PlanError
from mergetool.kernels.frank_wolfe import HELD
from mergetool.kernels.matching import MatchingProblem, waiting_scores
from mergetool.kernels.pieces import cut, face_size, families
from mergetool.kernels.spaces import Layout
from mergetool.networks.trace import prove_for_config, resolve
from mergetool.tensors.io import bytes_of

if TYPE_CHECKING:
    from mergetool.alignment.models import Headers, Models

KEPT_BYTES = 2 << 30
"""Models that together need no more than this (as float32) are held in memory while they are aligned."""

IMAGES, COPIES = 4, 8
"""Of one piece of every model: what a view of it holds, and what is made of that at the dearest moment."""

RETURNED = 32 << 20
"""Blocks of this size or more go back when they are freed. Smaller ones stay in the heap, in gaps that the next block
may not fit into: glibc raises its threshold up to here. How much is lost to gaps varies with every run."""


@dataclass(frozen=True)
class AlignmentTask:
    """Models to align, in the order of their contents: `weights[i]`, `problem.models[i]` are of the model `names[i]`.

    What is matched, in `problem`, are these weights, or what the networks make of data.
    """

    spec: ArchSpec
    names: tuple[str, ...]
    weights: tuple[Mapping[str, Tensor], ...]
    problem: MatchingProblem
    proof: float | None = None
    """Largest relative change of the network's outputs under the spec, where it is a file of the user's own."""

    def place(self, name: str, field: str) -> int:
        """Where a model stands. Raises PlanError, naming the recipe's field, for one that is not there."""
        if name not in self.names:
            raise PlanError(f"there is no model {name!r}", where=field, fix=f"one of: {', '.join(sorted(self.names))}")
        return self.names.index(name)


class Weights(Mapping[str, Tensor]):
    """The tensors of one model that take part in matching, read when asked for, and kept if `keep`."""

    def __init__(self, models: "Models", name: str, layouts: Mapping[str, tuple[Layout, ...]], *, keep: bool) -> None:
        self._models = models
        self._name = name
        self._layouts = layouts
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __getitem__(self, tensor: str) -> Tensor:
        if self._kept is None:
            return self._models.read(self._name, tensor)
        if tensor not in self._kept:
            self._kept[tensor] = self._models.read(self._name, tensor)
        return self._kept[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


def spec_of(models: "Models | Headers") -> ArchSpec:
    """The architecture of the models of a run. Raises PlanError if it is unknown, or nothing in it can move."""
    spec = resolve(models.architecture, models.shapes, models.config)
    check_shapes(spec, models.shapes, "the models")
    if not spec.layouts(matched=True):
        raise PlanError(
            f"no axis of the architecture {spec.family!r} can be permuted, so there is nothing to align",
            where="architecture",
            fix="name another family, or a file like arch/data/mlp.yaml, under `architecture:`",
        )
    return spec


def task_of(models: "Models", *, weighting: str = "none", match: MatchBy = WEIGHTS) -> AlignmentTask:
    """The task that the models of a run pose. `weighting`: "none" or "per-tensor" (see `MatchingProblem.of`).

    Raises PlanError for an unknown architecture, for models that do not fit it, for a file of the user's own that
    would change what the network computes, and for data that do not fit the network.
    """
    spec = spec_of(models)
    proof = _prove(spec, models)
    layouts: Mapping[str, tuple[Layout, ...]] = spec.layouts(matched=True)
    size = sum(4 * prod(models.shapes[name]) for name in layouts) * len(models.names)
    weights = {name: Weights(models, name, layouts, keep=size <= KEPT_BYTES) for name in models.names}
    names = tuple(sorted(weights, key=lambda name: _content(weights[name])))
    ordered = tuple(weights[name] for name in names)
    told: Sequence[Mapping[str, Tensor]] = ordered
    if match.by == "activations":
        layouts, told = said(match, models, spec, names)
    problem = MatchingProblem.of(spec.spaces, layouts, models=told, per_tensor=weighting == "per-tensor")
    return AlignmentTask(spec, names, ordered, problem, proof)


def search_bytes(spec: ArchSpec, num_models: int, threads: int, match: MatchBy = WEIGHTS) -> int:
    """Bytes that a search holds at most, counted, not measured.

    Small models are kept, very small ones with their images too. Beside that there is one sum of images, as large as a
    model, the piece that is worked on, several times for each model, and scores of families not yet complete. As much
    again as is made and freed in small blocks may be lost between them. Activations are searched in the same way, and
    are measured on one network at a time.
    """
    layouts = spec.layouts(matched=True)
    if match.by == "weights":
        return _search_bytes(spec, layouts, num_models, threads)
    weights = 4 * sum(prod(spec.tensors[name].shape) for name in layouts)
    kept = num_models * weights if num_models * weights <= KEPT_BYTES else 0
    return kept + 3 * weights + _search_bytes(spec, most_said(spec), num_models, threads)


def _search_bytes(spec: ArchSpec, layouts: Mapping[str, tuple[Layout, ...]], num_models: int, threads: int) -> int:
    pieces = cut(spec.spaces, layouts)
    one = 4 * sum(prod(piece.shape) for piece in pieces)
    models = num_models * one
    stack = num_models * max(4 * prod(piece.shape) for piece in pieces)
    widest = max(face_size(face) for piece in pieces for face in piece.faces)
    stacks = IMAGES * (models if models <= HELD else stack) + COPIES * stack
    waiting = waiting_scores(pieces, families(spec.spaces, pieces))
    scores = 4 * num_models * (waiting + widest**2) + 20 * (threads + 1) * widest**2
    gaps = (stacks if stack < RETURNED else 0) + (scores if 8 * widest**2 < RETURNED else 0)
    return (models if models <= KEPT_BYTES else 0) + one + stacks + scores + gaps


def _prove(spec: ArchSpec, models: "Models") -> float | None:
    """Try a user's own description on the network, where config.json tells which network that is."""
    if models.architecture is None or Path(models.architecture).suffix not in (".yaml", ".yml"):
        return None
    if not architectures(models.config):
        models.say("the architecture file was checked by shapes alone: no config.json tells a network to try it on")
        return None
    return prove_for_config(spec, models.shapes, models.config)


def _content(weights: Mapping[str, Tensor]) -> str:
    """A digest of all values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(bytes_of(weights[name].cpu().contiguous().view(-1)))
    return digest.hexdigest()
