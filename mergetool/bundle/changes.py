"""What the experts of a bundle add to its base, read in slices, whatever factors it is kept in."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mergetool.bundle.files import readable, triplet_names, whole_name
from mergetool.bundle.manifest import Head, Manifest, Task, read_manifest
from mergetool.bundle.masks import masked_change
from mergetool.bundle.verify import check_files
from mergetool.tensors.dtypes import BY_TORCH_NAME, DType

_SLICE = 1 << 18
"""Elements of a slice, or one row where that is longer."""


class BundleChanges:
    """The changes of every expert, by task and by the base's names. Raises SourceError for a damaged bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        check_files(folder, self.manifest, hashes=False)
        self.tasks: dict[str, Task] = {task.name: task for task in self.manifest.tasks}

    @property
    def dtype(self) -> DType:
        """That of the factors."""
        return BY_TORCH_NAME[self.manifest.dtype]

    def rank(self, task: str, name: str) -> int | None:
        """Directions that are kept of a change; None where it is kept in full, or nothing was changed."""
        parameter = self.manifest.parameters.get(name)
        return parameter.ranks[self.manifest.names.index(task)] if parameter is not None and parameter.ranks else None

    def base_digests(self) -> list[str]:
        """SHA-256 of the base's weights."""
        return sorted(self.manifest.base.files.values())

    def head_digest(self, task: str) -> str | None:
        """SHA-256 of a task's head."""
        head = self.tasks[task].head
        return None if head is None else self.manifest.files[head.file]

    def change(self, task: str, name: str) -> "ExpertChange":
        """What one expert adds to one tensor."""
        parameter = self.manifest.parameters.get(name)
        if parameter is None or parameter.policy == "skip" or self.rank(task, name) == 0:
            return ExpertChange()
        if parameter.policy == "mask":
            return ExpertChange(*_masked(self.folder, self.tasks[task], name))
        names = (whole_name(name),) if parameter.policy == "full" else triplet_names(name)
        return ExpertChange(*_read(self.folder / self.tasks[task].factors, names))

    def settings_of_head(self, task: str) -> dict[str, object] | None:
        """All that the manifest says of a head but where it lies."""
        head = self.tasks[task].head
        if head is None:
            return None
        hidden = {"file"} if isinstance(head, Head) else {"file", "layout"}
        return {**head.model_dump(mode="json", exclude=hidden), "weights": self.head_digest(task)}


class ExpertChange:
    """Zero, a tensor, or U diag(S) Vh; any slice of it, flat, in float64."""

    def __init__(self, *parts: Tensor) -> None:
        wide = [part.to(torch.float64) for part in parts]
        self._dense = wide[0].reshape(-1) if len(wide) == 1 else None
        self._product = (wide[0] * wide[1], wide[2]) if len(wide) > 1 else None

    def read(self, start: int, stop: int) -> Tensor:
        """Elements, of which a product has whole rows."""
        if self._dense is not None:
            return self._dense[start:stop]
        if self._product is None:
            return torch.zeros(stop - start, dtype=torch.float64)
        us, vh = self._product
        columns = vh.shape[1]
        return (us[start // columns : stop // columns] @ vh).reshape(-1)


def slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Whole rows at a time."""
    total, columns = math.prod(shape), math.prod(shape[1:])
    step = max(1, _SLICE // max(1, columns)) * columns
    yield from ((start, min(start + step, total)) for start in range(0, total, max(1, step)))


def _masked(folder: Path, task: Task, name: str) -> Iterator[Tensor]:
    with readable(folder / task.factors):
        yield masked_change(folder, task.factors, name, task.scale)


def _read(path: Path, names: Sequence[str]) -> Iterator[Tensor]:
    with readable(path), safe_open(path, framework="pt") as file:
        yield from [file.get_tensor(name) for name in names]
