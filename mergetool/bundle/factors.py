"""The factors of all tasks in memory, and what any group of tasks comes to.

The weights of a group of tasks are those of TSV-Merge over their stored factors, W0 + U' diag(S) V'^T, where U' and V'
are the nearest orthonormal ones to the tasks' vectors side by side. A group of one task is that compressed expert. What
is no matrix is the mean of the group's changes. Factors are only ever read.

U' and V' are made in float64 once a group. Keeping U and V as they are stored and a core C between them, U C V^T, would
save that, but C holds the inverses of U's and V's smallest singular values, in real fine-tunes down to 1e-7, and in
float32 the product then cancels to noise.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mergetool.bundle.files import read_all, triplet_names, whole_name
from mergetool.bundle.manifest import Manifest
from mergetool.kernels.spectral import Factors, concatenated, orthogonalised
from mergetool.networks.places import Fragment, composed

Group = tuple[int, ...]
"""Numbers of tasks, sorted."""


@dataclass
class GroupMatrix:
    """A matrix' change for one group: us (m, K), with the singular values in it, vh (K, n), in the model's dtype."""

    us: Tensor
    vh: Tensor
    num_rows_seen: int = 0
    """Rows (tokens) that went through it so far."""
    dense: Tensor | None = None
    """W0 + us vh, once that many rows have gone through that it pays."""
    kept: bool = False
    """Whether it is in the cache."""

    @property
    def worthwhile(self) -> int:
        """Rows after which making the dense matrix is cheaper than having gone without: m n / (m + n)."""
        (m, _), (_, n) = self.us.shape, self.vh.shape
        return m * n // (m + n)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.us, self.vh, self.dense) if tensor is not None)

    def change(self) -> Tensor:
        """us vh, (m, n)."""
        return self.us @ self.vh


@dataclass
class GroupChanges:
    """Everything of one group that was asked for so far."""

    matrices: dict[str, GroupMatrix] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    num_bytes: int = 0
    """What is kept of it."""
    last_pass: int = 0
    """The number of the pass that used it last."""


class TaskFactors:
    """Stored factors of all tasks, and a cache of groups, least recently used out first. Safe for several threads.

    What is made for a group is made outside the lock: two threads may make the same, and the first one's is kept. A
    pass takes no room from what it uses itself, or all would be made anew in every pass that needs too much of it.
    """

    def __init__(self, manifest: Manifest, folder: Path, dtype: torch.dtype, cache_bytes: int) -> None:
        self.manifest = manifest
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._stored = [read_all(folder / task.factors) for task in manifest.tasks]
        self._groups: OrderedDict[Group, GroupChanges] = OrderedDict()
        self._num_passes = 0
        self._composed: dict[str, tuple[tuple[int, ...], tuple[Fragment, ...]]] = {}
        self._lock = threading.Lock()

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the factors, and forget what was made from them; what is made from now on is in `dtype`."""
        self._dtype = dtype
        self._stored = [{name: value.to(device) for name, value in stored.items()} for stored in self._stored]
        self._groups.clear()

    def compose(self, name: str, shape: tuple[int, ...], fragments: tuple[Fragment, ...]) -> None:
        """Let `name` mean a parameter that is made of several tensors; it is kept in full."""
        self._composed[name] = shape, fragments

    def policy(self, name: str) -> Literal["svd", "full", "skip"]:
        """How a tensor's changes are kept."""
        policy = "full" if name in self._composed else self.manifest.parameters[name].policy
        return "full" if policy == "mask" else policy

    def of(self, task: int, name: str) -> Factors:
        """A task's factors of a tensor as they are stored (rank 0 where it changed nothing)."""
        stored = self._stored[task]
        u, s, vh = triplet_names(name)
        if u not in stored:
            shape = self.manifest.parameters[name].shape
            empty = next(iter(stored.values())).new_zeros(0) if stored else torch.zeros(0)
            columns = torch.Size(shape[1:]).numel()
            return Factors(empty.expand(shape[0], 0), empty, empty.expand(columns, 0))
        return Factors(stored[u], stored[s], stored[vh].mT)

    def changes(self, group: Group) -> GroupChanges:
        """The cache entry of a group, made the most recent one."""
        with self._lock:
            changes = self._groups.setdefault(group, GroupChanges())
            self._groups.move_to_end(group)
            changes.last_pass = self._num_passes
            return changes

    def end_pass(self) -> None:
        """What was used so far may have to make room for what comes."""
        with self._lock:
            self._num_passes += 1

    @property
    def num_bytes(self) -> int:
        """What is kept of all groups."""
        return sum(changes.num_bytes for changes in self._groups.values())

    def _has_room(self, changes: GroupChanges, num_bytes: int, *, alone: bool = True) -> bool:
        """Whether so much more may be kept of a group, once those are gone that were not used for longest.

        `alone`: the only group is kept in any case, as making it anew for every token would cost more than it takes.
        """
        with self._lock:
            while self.num_bytes + num_bytes > self._cache_bytes:
                oldest = next(iter(self._groups), None)
                if oldest is None or self._groups[oldest].last_pass == self._num_passes:
                    break
                del self._groups[oldest]
            fits = self.num_bytes + num_bytes <= self._cache_bytes or (alone and len(self._groups) == 1)
            changes.num_bytes += num_bytes if fits else 0
            return fits

    def matrix(self, group: Group, name: str) -> GroupMatrix:
        """A matrix' change for a group, from the cache or made now."""
        changes = self.changes(group)
        if (known := changes.matrices.get(name)) is not None:
            return known
        made = self._matrix(group, name)
        if self._has_room(changes, made.num_bytes):
            made.kept = True
            return changes.matrices.setdefault(name, made)
        return made

    def dense(self, group: Group, matrix: GroupMatrix, weight: Tensor) -> Tensor:
        """W0 + us vh of a group's matrix, kept where there is room."""
        if matrix.dense is not None:
            return matrix.dense
        dense = weight + matrix.change().to(weight)
        if matrix.kept and self._has_room(self.changes(group), dense.nbytes, alone=False):
            matrix.dense = dense
        return dense

    def _matrix(self, group: Group, name: str) -> GroupMatrix:
        every = concatenated([self.of(task, name).to(torch.float64) for task in group or (0,)])
        every = every if group else every.leading(0)  # no task: the base
        if len(group) > 1:
            every = orthogonalised(every)
        return GroupMatrix((every.u * every.s).to(self._dtype), every.v.mT.to(self._dtype).contiguous())

    def vector(self, group: Group, name: str) -> Tensor:
        """The mean change of a tensor that is stored in full."""
        changes = self.changes(group)
        if (held := changes.vectors.get(name)) is not None:
            return held
        if name in self._composed:
            shape, fragments = self._composed[name]
            change = composed(shape, fragments, lambda part: self._changed(group, part)).to(self._dtype)
        else:
            total = torch.zeros(self.manifest.parameters[name].shape, dtype=torch.float32)
            for task in group:
                change = self.in_full(task, name)
                total = total.to(change.device) + change
            change = (total / max(1, len(group))).to(self._dtype)
        return changes.vectors.setdefault(name, change) if self._has_room(changes, change.nbytes) else change

    def in_full(self, task: int, name: str) -> Tensor:
        """A task's change of a tensor that is stored in full."""
        return self._stored[task][whole_name(name)]

    def _changed(self, group: Group, name: str) -> Tensor | None:
        """A tensor's change, or None where no expert changed it."""
        parameter = self.manifest.parameters.get(name)
        return None if parameter is None or parameter.policy == "skip" else self.dense_change(group, name)

    def dense_change(self, group: Group, name: str) -> Tensor:
        """The whole change of any tensor for a group, in its own shape."""
        if self.policy(name) == "full":
            return self.vector(group, name)
        return self.matrix(group, name).change().view(self.manifest.parameters[name].shape)

    def bases(self, names: Sequence[str], transposed: Sequence[bool]) -> list[list[Tensor]]:
        """Singular vectors on the side of the inputs, (k, inputs) float32, of every task, for each of the matrices.

        `transposed`: whether a matrix is stored as (inputs, outputs).
        """
        bases = []
        for name, turned in zip(names, transposed, strict=True):
            every = [self.of(task, name) for task in range(len(self.manifest.tasks))]
            bases.append([(factors.u if turned else factors.v).mT.float().contiguous() for factors in every])
        return bases
