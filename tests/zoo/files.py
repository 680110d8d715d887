"""The same model as people have it: written under other names, in another layout, with copies, in another dtype.

Each takes a folder and writes another one that transformers opens as the same model (a test says so), unless the name
says otherwise.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.zoo.build import copy_side_files

State = dict[str, torch.Tensor]


def weights(folder: Path) -> State:
    """All tensors of a folder's own safetensors files."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def rewritten(folder: Path, source: Path, change: Callable[[State], State]) -> Path:
    """`source` with other tensors; everything else is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.clone().contiguous() for name, value in change(weights(source)).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    copy_side_files(source, folder)
    return folder


def renamed(folder: Path, source: Path, pattern: str, name: str) -> Path:
    """`source` with other names, by a regular expression."""
    return rewritten(folder, source, lambda state: {re.sub(pattern, name, key): value for key, value in state.items()})


def prefixed(folder: Path, source: Path, prefix: str) -> Path:
    """Saved by torch.compile (`_orig_mod.`) or from a parallel wrapper (`module.`). transformers does not open it."""
    return renamed(folder, source, "^", prefix)


def without_prefix(folder: Path, source: Path, prefix: str) -> Path:
    """Saved from the inner model: `h.0.attn` for `transformer.h.0.attn`."""
    return renamed(folder, source, f"^{re.escape(prefix)}", "")


def gamma_and_beta(folder: Path, source: Path) -> Path:
    """Layer norms under the names that TensorFlow gave them."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    pattern = "|".join(map(re.escape, old))
    return rewritten(
        folder, source, lambda state: {re.sub(pattern, lambda m: old[m[0]], key): v for key, v in state.items()}
    )


def with_copies(folder: Path, source: Path, original: str, *copies: str) -> Path:
    """One tensor stored again under other names: a tied head, T5's three embeddings."""
    return rewritten(folder, source, lambda state: state | dict.fromkeys(copies, state[original]))


def with_own_head(folder: Path, source: Path, original: str, head: str, seed: int = 9) -> Path:
    """A head that differs from the embeddings to which the config ties it."""
    generator = torch.Generator().manual_seed(seed)

    def add(state: State) -> State:
        value = state[original]
        return state | {head: value + 0.1 * torch.randn(value.shape, generator=generator)}

    return rewritten(folder, source, add)


def with_old_buffers(folder: Path, source: Path, **buffers: torch.Tensor) -> Path:
    """Buffers that earlier versions saved. A `N` in a name stands for the layers 0 and 1."""
    found = {
        name.replace("__", ".").replace("N", str(layer)): value
        for name, value in buffers.items()
        for layer in range(2 if "N" in name else 1)
    }
    return rewritten(folder, source, lambda state: state | found)


def in_dtype(folder: Path, source: Path, dtype: torch.dtype) -> Path:
    """Every floating-point tensor stored in another dtype (config.json is left as it is)."""
    return rewritten(
        folder,
        source,
        lambda state: {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()},
    )
