"""Bases and fine-tunes: what `save_pretrained` leaves, with every floating-point tensor of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo.families import FAMILIES
from tests.zoo.text import save_tokenizer


def build(folder: Path, family: str, seed: int = 0, *, model: type | None = None, **changes: Any) -> Path:
    """Save a base of this family into `folder`. `changes` go to its config."""
    kind = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = (model or kind.model)(kind.config(**changes))
    stir(made, seed, size=0.1)
    made.save_pretrained(folder)
    if kind.text:
        save_tokenizer(folder)
    return folder


def tuned(
    folder: Path, base: Path, seed: int, *, model: type, save: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Save a fine-tune of `base`, opened as `model`: parts that the base lacks are new, every tensor is its own.

    `save` goes to `save_pretrained`, `changes` to the config.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model.from_pretrained(base, **changes)
    stir(made, seed)
    made.save_pretrained(folder, **(save or {}))
    copy_side_files(base, folder)
    return folder


def stir(model: nn.Module, seed: int, size: float = 0.05) -> None:
    """Add noise to every floating-point tensor of a module; shared ones stay shared."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                noise = torch.randn(value.shape, generator=generator)
                value.add_(size * noise.to(value.dtype))


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer files and the like, where `folder` has none of that name."""
    for path in source.iterdir():
        if path.suffix not in (".safetensors", ".bin") and not path.name.endswith(".index.json"):
            target = folder / path.name
            if path.is_file() and not target.exists():
                shutil.copy(path, target)


def config_of(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **changes: Any) -> Path:
    """Write other values into config.json; None removes a key. Mappings are merged, as deep as they go."""
    changed = _changed(config_of(folder), changes)
    (folder / "config.json").write_text(json.dumps(changed, indent=2))
    return folder


def _changed(found: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    deep = {
        key: _changed(found[key], value) if isinstance(value, dict) and isinstance(found.get(key), dict) else value
        for key, value in changes.items()
    }
    return {key: value for key, value in {**found, **deep}.items() if value is not None or key not in changes}


def copy_of(folder: Path, source: Path, **changes: Any) -> Path:
    """A whole model folder, with other values in its config.json."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return change_config(folder, **changes)
