"""REPAIR as the last step of a run: merged weights in, tensors to replace out.

The replaced tensors are kept in `alignment/repair.safetensors` before anything is overwritten, so that a run killed in
between ends with the same result.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mergetool.alignment.fitted import Aligned
from mergetool.alignment.network import Network, build, read_batches
from mergetool.alignment.options import Repair
from mergetool.alignment.repair import Repaired, correctable, repair, reset_statistics
from mergetool.arch.spec import ArchSpec
from mergetool.errors import PlanError
from mergetool.tensors.writer import sync_folder, write_file

if TYPE_CHECKING:
    from mergetool.methods.base import Models

TENSORS, REPORT = "alignment/repair.safetensors", "alignment/repair.json"


def finish(
    options: Repair, models: "Models", fitted: Aligned, merged: Mapping[str, Tensor], folder: Path | None
) -> Mapping[str, Tensor]:
    """The tensors that REPAIR changes, in compute dtype, kept in `folder`. Raises PlanError or SourceError."""
    from safetensors.torch import load_file, save_file

    if folder is not None and (folder / TENSORS).is_file():
        return load_file(folder / TENSORS)
    done = _repaired(options, models, fitted, merged)
    models.say(f"repaired {len(done.tensors)} tensors")
    if folder is not None:
        (folder / TENSORS).parent.mkdir(exist_ok=True)
        write_file(
            folder / REPORT, json.dumps({"mode": options.mode, "std over parents'": done.ratios}, indent=1) + "\n"
        )
        unfinished = folder / f"{TENSORS}.unfinished"
        save_file(done.tensors, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(folder / TENSORS)
        sync_folder((folder / TENSORS).parent)
    return done.tensors


def _repaired(options: Repair, models: "Models", fitted: Aligned, merged: Mapping[str, Tensor]) -> Repaired:
    assert options.data is not None
    network = build(models, options.network)
    batches = read_batches(models.path(options.data), network.module)
    weights = network.inside(merged)
    try:
        if options.mode == "bn-stats":
            found = reset_statistics(network.module, weights, batches)
        else:
            parents = [_Parent(models, fitted, network, name) for name in models.names]
            layers = _layers(network, fitted.spec)
            found = repair(network.module, weights, parents, layers=layers, batches=batches)
    except (ValueError, RuntimeError, TypeError) as error:
        what = f"the data cannot be run through the network: {str(error).splitlines()[0]}"
        raise PlanError(
            what, where="merge.repair", fix="check `data` and `network`, or set repair.mode: none"
        ) from error
    return Repaired({network.names[name]: x.contiguous() for name, x in found.tensors.items()}, found.ratios)


class _Parent(Mapping[str, Tensor]):
    """An aligned model by the names of the network, read when asked for."""

    def __init__(self, models: "Models", fitted: Aligned, network: Network, name: str) -> None:
        self._models, self._fitted, self._network, self._name = models, fitted, network, name

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._network.names[key]
        return self._fitted.apply(self._name, tensor, self._models.read(self._name, tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.names)

    def __len__(self) -> int:
        return len(self._network.names)


def _layers(network: Network, spec: ArchSpec) -> list[str]:
    """The layers whose output channels may be permuted."""
    movable = {space.name for group in spec.groups for space in group.spaces}
    found = []
    for layer, (weight, axis) in correctable(network.module).items():
        layout = spec.tensors[network.names[weight]].axes[axis]
        if any(factor.space in movable for segment in layout for factor in segment):
            found.append(layer)
    return found
