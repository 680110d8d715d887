"""REPAIR as the last step of a run: merged weights in, tensors to replace out.

The replaced tensors are kept in `alignment/repair.safetensors` before anything is overwritten, so that a run killed in
between ends with the same result.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mergetool.alignment.fitted import Aligned
from mergetool.alignment.network import Network, ParentWeights, build, data_that_fit, read_batches
from mergetool.alignment.options import Repair
from mergetool.alignment.repair import Batch, Repaired, correctable, each_on, repair, reset_statistics, try_out
from mergetool.arch.spec import ArchSpec
from mergetool.tensors.writer import sync_folder, write_file, write_tensors

if TYPE_CHECKING:
    from mergetool.alignment.models import Fitted, Models

TENSORS, REPORT = "alignment/repair.safetensors", "alignment/repair.json"


def finish(
    options: Repair, models: "Models", fitted: "Fitted", merged: Mapping[str, Tensor], folder: Path | None
) -> Mapping[str, Tensor]:
    """The tensors that REPAIR changes, in compute dtype, kept in `folder`. Raises PlanError or SourceError."""
    from safetensors.torch import load_file

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
        write_tensors(unfinished, done.tensors)
        unfinished.rename(folder / TENSORS)
        sync_folder((folder / TENSORS).parent)
    return done.tensors


def check(options: Repair, models: "Models") -> None:
    """Run a few rows of the data through the first model, so that what does not fit is told before anything is done.

    Raises PlanError or SourceError.
    """
    if options.mode == "none":
        return
    network, batches = _network_and_data(options, models)
    first = ParentWeights(models, None, network, models.names[0])
    with data_that_fit("merge.repair", "repair.mode: none"):
        try_out(network.module, first, batches[0], statistics=options.mode == "bn-stats")


def _repaired(options: Repair, models: "Models", fitted: "Fitted", merged: Mapping[str, Tensor]) -> Repaired:
    network, batches = _network_and_data(options, models)
    weights = network.inside(merged)
    with data_that_fit("merge.repair", "repair.mode: none"):
        if options.mode == "bn-stats":
            corrected = reset_statistics(network.module, weights, batches)
        else:
            parents = [ParentWeights(models, fitted, network, name) for name in models.names]
            assert isinstance(fitted, Aligned), "only permuted models are parents"
            layers = _layers(network, fitted.spec)
            corrected = repair(network.module, weights, parents, layers=layers, batches=batches)
    tensors = {network.names[name]: x.cpu().contiguous() for name, x in corrected.tensors.items()}
    return Repaired(tensors, corrected.ratios)


def _network_and_data(options: Repair, models: "Models") -> tuple[Network, list[Batch]]:
    assert options.data is not None
    network = build(models, options.network, "merge.repair")
    batches = read_batches(models, options.data, network.module)
    network.module.to(models.device)
    return network, [each_on(models.device, batch) for batch in batches]


def _layers(network: Network, spec: ArchSpec) -> list[str]:
    """The layers whose output channels may be permuted."""
    movable = {space.name for group in spec.groups for space in group.spaces}
    layers = []
    for layer, (weight, axis) in correctable(network.module).items():
        layout = spec.tensors[network.names[weight]].axes[axis]
        if any(factor.space in movable for segment in layout for factor in segment):
            layers.append(layer)
    return layers
