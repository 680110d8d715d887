"""What goes into a bundle: the experts, what is kept of them, and how tasks are to be chosen."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from mergetool.arch.matrices import MatrixFilter
from mergetool.bundle.manifest import Features, Gate, HeadRule, Kind, Mode, Norm, Per, Pool, Storage, UnknownRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergetool.bundle.alike import Alike
    from mergetool.bundle.present import OwnHead
    from mergetool.bundle.task_vector import TaskVector
    from mergetool.kernels.spectral import Rank
    from mergetool.tensors.source import ModelSource

T = TypeVar("T")
TAKING = "taking models apart"


@dataclass(frozen=True)
class HeadSource:
    """Where a task's head is, and what it reads."""

    path: Path
    pool: Pool
    normalize: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class RouterOptions:
    """What a recipe says about routing; `layers` are globs on names of matrices, or auto."""

    layers: tuple[str, ...] | Literal["auto"]
    features: Features
    pool: Pool
    norm: Norm
    mode: Mode
    threshold: float
    top_k: int
    temperature: float
    redundancy: float
    per: Per | None = None
    early: int | None = None
    rank: int | None = None
    """Directions that are compared, where these are not the ones that are kept."""
    gate: Gate | None = None
    unknown: UnknownRule | None = None
    doubt: float = 1.0


@dataclass(frozen=True)
class Options:
    """What is kept of every expert, and how a bundle is used."""

    kind: Kind
    rank: "Rank"
    filter: MatrixFilter
    conv: Literal["mean", "matricize"]
    dtype: Storage
    size: float | None
    """Most that factors may take, as a share of the base's bytes (see `most_bytes`)."""
    base: Literal["copy", "reference"]
    router: RouterOptions | None = None
    heads: HeadRule = "joint"
    of_numbers: bool = False
    """Take `size` as if the base was stored in float32 and factors in two bytes, so that no dtype decides on ranks."""
    margin: float = 0.0
    """TALL masks: an entry is an expert's own where its change exceeds this many times what others add to it."""
    scale: float = 0.0
    """Twin-Merging, WEMoE: what the sum of all changes is multiplied by before it is added to the base."""
    own: tuple[str, ...] | Literal["all", "mlp"] = "all"
    """WEMoE: what experts keep for themselves, and is not merged: those of MLPs, or globs on names of tensors."""


class Experts(Protocol):
    """The models that go into a bundle."""

    names: tuple[str, ...]
    """Tasks in order; the base is called "base"."""
    sources: "Mapping[str, ModelSource]"
    heads: "Mapping[str, HeadSource | OwnHead]"
    shapes: Mapping[str, tuple[int, ...]]
    """Tensors whose changes are kept, with their shapes, in file order."""

    def read(self, model: str, name: str) -> "Tensor":
        """One tensor, whole, in compute dtype; that of the base where the model lacks it."""
        ...

    def change(self, model: str, name: str) -> "TaskVector":
        """What a model changed of a tensor."""
        from mergetool.bundle.task_vector import Difference

        return Difference(self.read(model, name).sub_(self.read("base", name)), (model, name))

    def share(
        self, call: Callable[[str], T], items: Sequence[str], num_threads: int, label: str = TAKING
    ) -> Sequence[T]:
        """`call` of every item, in order, by so many threads; several processes share the work. `label`: says it."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(call, items))

    def met(self, pairs: "Sequence[Alike]") -> None:
        """These changed nearly the same."""

    @property
    def device(self) -> "torch.device":
        """Where to compute."""
        import torch

        return torch.device("cpu")

    @property
    def leaving(self) -> Path | None:
        """The bundle in whose place the new one comes."""
        return None

    @property
    def leads(self) -> bool:
        """Whether this process does what is not shared. The others return None in its stead."""
        return True

    def digests(self, model: str) -> Mapping[str, str]:
        """SHA-256 of a model's weight files, by file name."""
        ...

    def provenance(self, task: str) -> tuple[str, Mapping[str, str]]:
        """What an expert's folder is called, and `digests` of its files."""
        folder = self.sources[task].folder
        return folder.name if folder else "", self.digests(task)
