"""Toy models: shaped like a small transformer plus every odd tensor, drawn without torch's random numbers.

Values come from raw words of PCG64, which numpy promises never to change. `exact` toys lie on a coarse binary grid:
differences, doublings and short sums of them are exact in float32, and many magnitudes are equal (as with 16-bit
models).
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Shapes = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.up_proj.weight": (9, 6),
    "model.layers.0.mlp.up_proj.bias": (9,),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.1.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.mlp.up_proj.weight": (9, 6),
    "model.layers.1.mlp.up_proj.bias": (9,),
    "model.layers.1.input_layernorm.weight": (6,),
    "vision.patch_embed.weight": (4, 3, 2, 2),
    "vision.cls_token": (1, 1, 6),
    "logit_scale": (),
    "adapter.empty.weight": (0, 6),
    "lm_head.weight": (11, 6),
}
FEW: Shapes = {
    name: shape
    for name, shape in SHAPES.items()
    if not name.endswith(("norm.weight", "lm_head.weight", "1.self_attn.q_proj.weight", "1.mlp.up_proj.bias"))
}
"""Every kind of tensor, a matrix of the same shape in two layers."""
LESS: Shapes = {name: FEW[name] for name in FEW if not name.endswith("cls_token")}
"""Each shape that methods tell from others."""
MLP: Shapes = {"fc1.weight": (7, 5), "fc1.bias": (7,), "fc2.weight": (3, 7), "fc2.bias": (3,)}
"""A network whose neurons can be permuted."""
INTEGERS = {"position_ids": torch.arange(8).reshape(1, 8), "causal": torch.tensor([True, False, True])}


@lru_cache(maxsize=4096)
def words(count: int, *names: object) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """Random 64-bit words that depend on nothing but the names."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.asarray(np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(count), dtype=np.uint64)


def uniform(shape: tuple[int, ...], *names: object) -> torch.Tensor:
    """Float32 numbers on [-1, 1), multiples of 2^-23."""
    drawn = (words(prod(shape), *names) >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0
    return torch.from_numpy(drawn.astype(np.float32)).reshape(shape)


def whole(shape: tuple[int, ...], largest: int, *names: object) -> torch.Tensor:
    """Float32 whole numbers on [-largest, largest]."""
    drawn = (words(prod(shape), *names) % np.uint64(2 * largest + 1)).astype(np.float64) - largest
    return torch.from_numpy(drawn.astype(np.float32)).reshape(shape)


def toy_base(seed: object = 0, *, exact: bool = True, shapes: Shapes = SHAPES) -> State:
    """A base model: multiples of 1/64 if `exact`, else any float32 numbers."""
    if exact:
        return {name: whole(shape, 128, seed, "base", name) / 64 for name, shape in shapes.items()}
    return {name: uniform(shape, seed, "base", name) for name, shape in shapes.items()}


def toy_deltas(model: str, seed: object = 0, *, exact: bool = True, shapes: Shapes = SHAPES) -> State:
    """A task vector a few percent the size of the base; multiples of 1/256 if `exact`, one in 41 of them zero."""
    if exact:
        return {name: whole(shape, 20, seed, model, name) / 256 for name, shape in shapes.items()}
    return {name: uniform(shape, seed, model, name) / 16 for name, shape in shapes.items()}


def toy_models(
    names: Iterable[str] = "abc", seed: object = 0, *, exact: bool = True, shapes: Shapes = SHAPES
) -> tuple[State, dict[str, State]]:
    """(base, models by name): the base plus a task vector each."""
    base = toy_base(seed, exact=exact, shapes=shapes)
    return base, {name: plus(base, toy_deltas(name, seed, exact=exact, shapes=shapes)) for name in names}


def plus(state: State, other: State, factor: float = 1.0) -> State:
    """`state + factor * other`, tensor by tensor."""
    return {name: value + factor * other[name] for name, value in state.items()}


def minus(state: State, other: State) -> State:
    """`state - other`, tensor by tensor."""
    return plus(state, other, -1.0)


def times(state: State, factor: float) -> State:
    """`factor * state`, tensor by tensor."""
    return {name: value * factor for name, value in state.items()}


def toy_statistics(kind: str, model: str, state: State) -> State:
    """A made-up statistic of one model: the same for tensors of one shape, as of weights that are stored twice.

    `gram` and kinds of it: positive definite matrices as wide as two-dimensional tensors; `coefficient` and `loss`: one
    number; `features`: one vector; else numbers above 0 like each tensor.
    """
    if kind in ("coefficient", "loss", "features"):
        value = whole((1, 1, 1, 6) if kind == "features" else (), 4, kind, model).abs() / 8 + 0.125
        return {name: value.clone() for name, each in state.items() if each.is_floating_point()}
    if not kind.endswith("gram"):
        floats = {name: value for name, value in state.items() if value.is_floating_point()}
        return {name: 1.0 + whole(tuple(value.shape), 15, kind, model).abs() / 4 for name, value in floats.items()}
    wide = {name: value.shape[1] for name, value in state.items() if value.ndim == 2 and value.is_floating_point()}
    inputs = {width: whole((2 * width, width), 4, kind, model) / 2 for width in set(wide.values())}
    return {name: inputs[width].mT @ inputs[width] + torch.eye(width) for name, width in wide.items()}


def write_statistics(folder: Path, statistics: Mapping[str, State] | None) -> dict[str, Any]:
    """Save made-up statistics; the section of a recipe that names them, if there are any."""
    if statistics is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in statistics.items():
        save_file(state, folder / f"{name}.safetensors")
    return {"calibration": {name: {"measured": str(folder / f"{name}.safetensors")} for name in statistics}}


def write(folder: Path, states: Mapping[str, State]) -> dict[str, Path]:
    """Save state dicts as model folders; the paths by name."""
    paths = {name: folder / name for name in states}
    for name, state in states.items():
        paths[name].mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in state.items()}, paths[name] / "model.safetensors")
    return paths


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a merged checkpoint, whatever its shards."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_bytes(found: State, expected: State) -> None:
    """Same names, dtypes, shapes and bits."""
    _assert_same_names(found, expected)
    for name, value in expected.items():
        _assert_same(f"{name}: dtype", found[name].dtype, value.dtype)
        _assert_same(f"{name}: shape", tuple(found[name].shape), tuple(value.shape))
        if not _bytes_of(found[name]).equal(_bytes_of(value)):
            raise AssertionError(f"{name}: {_differences(found[name], value, 0.0) or 'the bytes differ'}")


def assert_near(found: State, expected: State, tolerance: float = 1e-5) -> None:
    """Same names and shapes, and values that differ by at most `tolerance`."""
    _assert_same_names(found, expected)
    for name, value in expected.items():
        _assert_same(f"{name}: shape", tuple(found[name].shape), tuple(value.shape))
        if difference := _differences(found[name], value, tolerance):
            raise AssertionError(f"{name}: {difference}")


def _assert_same_names(found: State, expected: State) -> None:
    _assert_same("tensors", sorted(found), sorted(expected))


def _assert_same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found}, expected {expected}")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _differences(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """How many values are further apart than `tolerance` (or no numbers), and the first two; else nothing."""
    left, right = found.double().reshape(-1), expected.double().reshape(-1)
    (places,) = (~((left == right) | ((left - right).abs() <= tolerance))).nonzero(as_tuple=True)
    if not len(places):
        return ""
    first = int(places[0])
    apart = f"{len(places)} of {len(left)} values differ by more than {tolerance:g}"
    return f"{apart}; the first, at {first}, is {left[first]:.9g}, expected {right[first]:.9g}"
