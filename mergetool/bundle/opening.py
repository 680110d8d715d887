"""Open a bundle. What serves one imports this and what it needs, and nothing of recipes, plans or runs."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mergetool.bundle.classes import load_networks, stored_dtype
from mergetool.bundle.manifest import ClassHead, Head, read_manifest
from mergetool.bundle.masks import open_factors
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.verify import base_folder, check_base, check_files, check_shapes
from mergetool.errors import PlanError
from mergetool.networks.build import LoadedModel, load_base
from mergetool.networks.places import TensorMap
from mergetool.networks.spread import Spread
from mergetool.units import parse_size

CACHE_BYTES = 1 << 30


def load_bundle(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    cache_bytes: int | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    memory: int | str | None = None,
) -> MassModel:
    """Open a bundle as a model: `model("text")`, `route(**inputs)`, `forward(**inputs)`, `generate(**inputs)`.

    `dtype` is that of the base and of arithmetic with the factors (default: as the base is stored), `verify` compares
    every file with its SHA-256, `cache_bytes` may be kept of groups of tasks between calls. A base that does not fit
    the device is dealt over it, memory and the disk with `device_map="auto"` (accelerate's); of it at most `memory` (in
    bytes, or like 8GiB) stays in memory.
    Raises SourceError for a bundle that is damaged, incomplete, or whose base is another model.
    """
    most = None if memory is None else parse_size(memory)
    spread = None if device_map is None else Spread(device_map, most, one_device=True)
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=verify)
    check_base(folder, manifest, hashes=verify)
    check_shapes(folder, manifest)
    place = base_folder(folder, manifest)
    matrices = [task for task in manifest.tasks if isinstance(task.head, Head)]
    plain = bool(matrices) or all(task.head is None for task in manifest.tasks)
    if spread is not None and any(isinstance(task.head, ClassHead) for task in manifest.tasks):
        what = "its experts are classes with heads of their own, whose network is built in memory"
        raise PlanError(what, str(folder), "leave device_map out, and move it whole: .to(device)")
    base = load_base(place, dtype, encoder=bool(matrices), spread=spread) if plain else None
    dtype = next(base.model.parameters()).dtype if base is not None else dtype or stored_dtype(place)
    factors = open_factors(manifest, folder, dtype, CACHE_BYTES if cache_bytes is None else cache_bytes)
    networks = load_networks(manifest, folder, place, factors, dtype)
    base = base or LoadedModel(networks[0].base, TensorMap(networks[0].names))
    model = MassModel(manifest, base, factors, folder, networks)
    if spread is not None:
        model.follow()
    return model
