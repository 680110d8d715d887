"""The factors of all tasks in memory, and what any group of tasks comes to.

The weights of a group of tasks are those of TSV-Merge over their stored factors, W0 + U C V^T with U and V side by
side and a small core C (see `mergetool.kernels.spectral`). A group of one task is that compressed expert, C = diag(S).
What is no matrix is the mean of the group's changes. Factors are only ever read.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mergetool.bundle.manifest import Manifest
from mergetool.kernels.spectral import Factors, concatenated, core

Group = tuple[int, ...]
"""Numbers of tasks, sorted."""


@dataclass
class GroupMatrix:
    """A matrix' change for one group: u (m, K), core (K, K), vh (K, n), in the dtype that the model computes in."""

    u: Tensor
    core: Tensor
    vh: Tensor
    num_rows_seen: int = 0
    """Rows (tokens) that went through it so far."""
    dense: Tensor | None = None
    """W0 + u core vh, once that many rows have gone through that it pays."""

    @property
    def worthwhile(self) -> int:
        """Rows after which making the dense matrix is cheaper than having gone without: m n / (m + n)."""
        (m, _), (_, n) = self.u.shape, self.vh.shape
        return m * n // (m + n)

    @property
    def num_bytes(self) -> int:
        held = [self.u, self.core, self.vh, *([] if self.dense is None else [self.dense])]
        return sum(each.numel() * each.element_size() for each in held)

    def change(self) -> Tensor:
        """u core vh, (m, n)."""
        return (self.u @ self.core) @ self.vh


@dataclass
class GroupChanges:
    """Everything of one group that was asked for so far."""

    matrices: dict[str, GroupMatrix] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        vectors = sum(each.numel() * each.element_size() for each in self.vectors.values())
        return vectors + sum(each.num_bytes for each in self.matrices.values())


class TaskFactors:
    """Stored factors of all tasks, and a cache of groups, least recently used out first."""

    def __init__(self, manifest: Manifest, folder: Path, dtype: torch.dtype, cache_bytes: int) -> None:
        self.manifest = manifest
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._stored = [_read(folder / task.factors) for task in manifest.tasks]
        self._groups: OrderedDict[Group, GroupChanges] = OrderedDict()

    def to(self, device: torch.device) -> None:
        """Move the factors, and forget what was made from them."""
        self._stored = [{name: value.to(device) for name, value in stored.items()} for stored in self._stored]
        self._groups.clear()

    def of(self, task: int, name: str) -> Factors:
        """A task's factors of a tensor as they are stored (rank 0 where it changed nothing)."""
        stored = self._stored[task]
        if f"{name}.U" not in stored:
            shape = self.manifest.parameters[name].shape
            empty = next(iter(stored.values())).new_zeros(0) if stored else torch.zeros(0)
            columns = torch.Size(shape[1:]).numel()
            return Factors(empty.expand(shape[0], 0), empty, empty.expand(columns, 0))
        return Factors(stored[f"{name}.U"], stored[f"{name}.S"], stored[f"{name}.Vh"].mT)

    def changes(self, group: Group) -> GroupChanges:
        """The cache entry of a group, made the most recent one."""
        if group not in self._groups:
            self._groups[group] = GroupChanges()
        self._groups.move_to_end(group)
        return self._groups[group]

    def trim(self) -> None:
        """Forget the groups that were not used for longest, until the cache is as small as it should be."""
        while len(self._groups) > 1 and sum(each.num_bytes for each in self._groups.values()) > self._cache_bytes:
            self._groups.popitem(last=False)

    def matrix(self, group: Group, name: str) -> GroupMatrix:
        """A matrix' change for a group, from the cache or made now."""
        known = self.changes(group).matrices
        if name not in known:
            known[name] = self._matrix(group, name)
        return known[name]

    def _matrix(self, group: Group, name: str) -> GroupMatrix:
        parts = [self.of(task, name) for task in group]
        every = concatenated([part.to(torch.float64) for part in parts])
        middle = torch.diag(every.s) if len(group) == 1 else core(every)
        u, vh = torch.cat([part.u for part in parts], 1), torch.cat([part.v for part in parts], 1).mT
        return GroupMatrix(u.to(self._dtype), middle.to(self._dtype), vh.to(self._dtype).contiguous())

    def vector(self, group: Group, name: str) -> Tensor:
        """The mean change of a tensor that is stored in full."""
        known = self.changes(group).vectors
        if name not in known:
            total = torch.zeros(self.manifest.parameters[name].shape, dtype=torch.float32)
            for task in group:
                total = total.to(self._stored[task][f"{name}.delta"].device) + self._stored[task][f"{name}.delta"]
            known[name] = (total / len(group)).to(self._dtype)
        return known[name]

    def dense_change(self, group: Group, name: str) -> Tensor:
        """The whole change of any tensor for a group, in its own shape."""
        parameter = self.manifest.parameters[name]
        if parameter.policy == "full":
            return self.vector(group, name)
        return self.matrix(group, name).change().view(parameter.shape)

    def bases(self, names: Sequence[str]) -> list[list[Tensor]]:
        """Right singular vectors, (k, n) float32, of every task, for each of the given matrices."""
        tasks = range(len(self.manifest.tasks))
        return [[self.of(task, name).v.mT.float().contiguous() for task in tasks] for name in names]


def _read(path: Path) -> Mapping[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
