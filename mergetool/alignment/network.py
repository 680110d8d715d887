"""The network behind a checkpoint, and data to run through it: what REPAIR and matching by activations need.

The network is the class that config.json names (built by transformers), or what a function of the user's returns:
`network: nets.py:build` calls `build()` of the file nets.py, which runs that file. Names of its parameters are those of
the checkpoint.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergetool.alignment.repair import Batch
from mergetool.errors import PlanError, SourceError
from mergetool.networks.plain import NetworkCode
from mergetool.networks.trace import network_of

if TYPE_CHECKING:
    from mergetool.alignment.models import Fitted, Models

BATCH = 100


@dataclass(frozen=True)
class Network:
    """A module, and for the names of its tensors those of the checkpoint."""

    module: nn.Module
    names: Mapping[str, str]

    def inside(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the module's names."""
        return {own: weights[name] for own, name in self.names.items()}


def build(models: "Models", factory: str | None, section: str) -> Network:
    """The network of a run's models: by `file.py:function`, or by config.json (None). Raises PlanError.

    `section` is the part of the recipe that asks for it.
    """
    if factory is None:
        return Network(*network_of(models.shapes, models.config))
    text, _, function = factory.rpartition(":")
    where = f"{section}.network: {models.path(text)}"
    return Network(
        NetworkCode(models.path(text), function).built(where, models.shapes), {name: name for name in models.shapes}
    )


def read_batches(models: "Models", text: str, network: nn.Module) -> list[Batch]:
    """The rows of a file that the recipe names: JSON lines of text or tokens, or .safetensors. Raises SourceError."""
    path = models.path(text)
    return _tokens(path, models) if path.suffix == ".jsonl" else _tensors(path, network)


def _tokens(path: Path, models: "Models") -> list[Batch]:
    """Rows as the first model's tokenizer reads them, those of one length together."""
    from mergetool.statistics.examples import batches, examples_of
    from mergetool.statistics.rows import Fields, read_rows

    rows, folder = read_rows(path, Fields()), models.folder or path.parent
    try:
        examples = examples_of(rows, folder, models.config, None, None)
    except SourceError as error:
        fix = "write rows that the first model takes, or give their tokens as a .safetensors file"
        raise SourceError(error.what, error.where, fix) from None
    listed = list(batches(examples))
    return [{key: torch.tensor([each.inputs[key] for each in batch]) for key in batch[0].inputs} for batch in listed]


def _tensors(path: Path, network: nn.Module) -> list[Batch]:
    """The rows of a .safetensors file in batches of 100. Raises SourceError."""
    import inspect

    tensors = read_tensors(path)
    starts = range(0, len(next(iter(tensors.values()))), BATCH)
    known = inspect.signature(network.forward).parameters
    unknown = [name for name in tensors if name not in known]
    if unknown and len(tensors) > 1:
        what = f"the network takes {', '.join(known)}, not {unknown[0]!r}"
        raise SourceError(what, str(path), "name the tensors like the arguments of the network")
    if unknown:
        (only,) = tensors.values()
        return [only[start : start + BATCH] for start in starts]
    return [{name: x[start : start + BATCH] for name, x in tensors.items()} for start in starts]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The rows of a .safetensors file: tensors with one row for each sample, all finite. Raises SourceError.

    They are named like the arguments of the network's `forward`; one tensor alone may have any name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    fix = "save e.g. {'pixel_values': images} with safetensors.torch.save_file"
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot be read as data: {error}", str(path), fix) from None
    lengths = {len(x) if x.ndim else 0 for x in tensors.values()}
    if len(lengths) != 1 or 0 in lengths:
        sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise SourceError(
            f"its tensors do not have one row per sample each: {sizes or 'there are none'}", str(path), fix
        )
    broken = [name for name, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
    if broken:
        raise SourceError(f"{broken[0]!r} holds values that are not finite", str(path), "leave those rows out")
    return tensors


@contextmanager
def data_that_fit(section: str, otherwise: str) -> Iterator[None]:
    """What torch says of data that do not fit a network, as an error for people."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        what = f"the data cannot be run through the network: {str(error).splitlines()[0]}"
        fix = f"check `data` and `network`, or set {otherwise}"
        raise PlanError(what, where=section, fix=fix) from error


class ParentWeights(Mapping[str, Tensor]):
    """A model by the names of the network, aligned if it was fitted, read when asked for."""

    def __init__(self, models: "Models", fitted: "Fitted | None", network: Network, name: str) -> None:
        self._models, self._fitted, self._network, self._name = models, fitted, network, name

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._network.names[key]
        weights = self._models.read(self._name, tensor)
        return weights if self._fitted is None else self._fitted.apply(self._name, tensor, weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.names)

    def __len__(self) -> int:
        return len(self._network.names)
