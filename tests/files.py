"""Small models on the disk: files with any header, folders, recipes. Everything real, nothing mocked."""

import json
import os
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.weight": (8, 8),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.mlp.weight": (8, 8),
    "model.layers.1.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
LONG = bool(os.environ.get("LONG_TESTS"))
"""Whether campaigns try all that they know (`scripts/test --long`), or some of it."""


def write_raw(path, header, data=b""):
    """A safetensors file with this header (a mapping, text or bytes) and this buffer, however wrong they are."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def tensors(seed, shapes=SHAPES, dtype=torch.float32):
    """Random tensors by name; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_model(folder, state, config=None, file="model.safetensors"):
    """A model folder: weights in one file, and config.json where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / file, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_models(folder, names=("base", "a", "b"), **changes):
    """Toy models `folder/NAME`, each with its own random weights."""
    for seed, name in enumerate(names):
        write_model(folder / name, tensors(seed, **changes))
    return folder


def write_recipe(path, **sections):
    """A recipe file made of these sections."""
    Path(path).write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


def write_sparse(path, num_bytes):
    """A sound file with one tensor of zeros, of which the disk holds only the header."""
    entry = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    write_raw(path, {"w": entry})
    os.truncate(path, Path(path).stat().st_size + num_bytes)
    return path


class Watch:
    """Progress that calls back: `on_advance(n)` after the n-th unit (from 1; 0 is what a resumed run begins with)."""

    def __init__(self, on_advance=lambda count: None):
        self.count = -1
        self.said = []
        self._on_advance = on_advance

    def start(self, total, label, unit="B"):
        pass

    def advance(self, num_bytes):
        self.count += 1
        self._on_advance(self.count)

    def say(self, text):
        self.said.append(text)

    def stop(self):
        pass


class StoppedError(Exception):
    """Stands for whatever ends a run in the middle."""


def stop_after(count):
    """Progress that ends a run after `count` units."""

    def on_advance(done):
        if done >= count:
            raise StoppedError

    return Watch(on_advance)


def content(folder):
    """Every file of a folder but the lock (which holds timings) and the card, as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("mergetool.json", "README.md")
    }
