"""Networks that are one chain of layers, found from shapes: MLPs and VGG-like convolutional nets.

A bare .safetensors file keeps tensors in no telling order, and an MLP calls its layers anything. The layers are found
as a path: weights whose names differ only in numbers follow each other by number; such runs are put in the one
order in which every layer reads as many units as the one before has (or, after convolutions, a multiple: the flattened
pixels). Vectors (biases, norms, running statistics) belong to the layer of the same module, to the one with the same
number (`bn3` to `conv3`), or to the one before them in a `Sequential`. What does not fit is an error, never a guess.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from mergetool.arch.spec import ArchSpec, TensorAxes, check
from mergetool.errors import PlanError
from mergetool.kernels.spaces import Factor, Layout, Space

Shapes = Mapping[str, tuple[int, ...]]
_RUNNING = ("running_mean", "running_var")
_FIX = "write an architecture file that names every axis, and put its path under `architecture:`"


def build_chain(name: str, kinds: Iterable[str], shapes: Shapes) -> ArchSpec:
    """The spec of a chain of layers; `kinds` holds "linear", "conv" or both.

    Raises PlanError if the tensors form no chain, or more than one.
    """
    ranks = {2 if kind == "linear" else 4 for kind in kinds}
    weights = [tensor for tensor, shape in shapes.items() if len(shape) in ranks]
    strangers = sorted(t for t, shape in shapes.items() if len(shape) not in {0, 1, *ranks} or 0 in shape)
    if strangers or not weights:
        what = f"{strangers[0]} {tuple(shapes[strangers[0]])} is no layer" if strangers else "there are no layers"
        raise PlanError(f"not a chain of layers: {what}", where=f"architecture {name}", fix=_FIX)
    order = _order(name, weights, shapes)
    spaces = {f"hidden.{k}": Space(f"hidden.{k}", shapes[w][0]) for k, w in enumerate(order[:-1])}
    tensors = {w: _weight(order, k, shapes) for k, w in enumerate(order)}
    for tensor, shape in shapes.items():
        if not shape:
            tensors[tensor] = TensorAxes((), (), matched=False)
        elif tensor not in tensors:
            layer = _owner(name, tensor, order, shapes)
            matched = tensor.rsplit(".", 1)[-1] not in _RUNNING
            tensors[tensor] = TensorAxes(tuple(shape), (_units(order, layer, shapes),), matched, (layer, len(order)))
    return check(ArchSpec(name, spaces, dict(sorted(tensors.items()))))


def _units(order: list[str], layer: int, shapes: Shapes) -> Layout:
    size = shapes[order[layer]][0]
    return ((Factor(size, f"hidden.{layer}" if layer < len(order) - 1 else None),),)


def _weight(order: list[str], layer: int, shapes: Shapes) -> TensorAxes:
    shape = tuple(shapes[order[layer]])
    columns: Layout = ((Factor(shape[1]),),)
    if layer:
        units = shapes[order[layer - 1]][0]
        pixels = (Factor(shape[1] // units),) if shape[1] > units else ()
        columns = ((Factor(units, f"hidden.{layer - 1}"), *pixels),)
    kernel = tuple(((Factor(size),),) for size in shape[2:])
    return TensorAxes(shape, (_units(order, layer, shapes), columns, *kernel), depth=(layer, len(order)))


def _order(name: str, weights: list[str], shapes: Shapes) -> list[str]:
    runs: dict[str, list[str]] = {}
    for weight in sorted(weights, key=_numbers):
        runs.setdefault(re.sub(r"\d+", "#", weight), []).append(weight)
    paths = _paths([run for run in runs.values() if _follows(run, shapes)], shapes)
    complete = [path for path in paths if len(path) == len(weights)]
    if len(complete) != 1:
        orders = "no order" if not complete else "more than one order"
        listed = ", ".join(f"{weight} {tuple(shapes[weight])}" for weight in sorted(weights, key=_numbers)[:6])
        raise PlanError(f"{orders} in which the layers fit: {listed}", where=f"architecture {name}", fix=_FIX)
    return complete[0]


def _paths(runs: list[list[str]], shapes: Shapes) -> list[list[str]]:
    """Orders in which the runs form one chain; stops at the second, which already tells that there is no single one."""
    paths: list[list[str]] = []

    def extend(path: list[str], left: list[list[str]]) -> None:
        if not left:
            paths.append(path)
        for k, run in enumerate(left):
            if len(paths) < 2 and (not path or _follows([path[-1], run[0]], shapes)):
                extend(path + run, left[:k] + left[k + 1 :])

    extend([], runs)
    return paths


def _follows(path: list[str], shapes: Shapes) -> bool:
    """Whether each layer reads what the one before gives."""
    for first, second in pairwise(path):
        units, (_, reads) = shapes[first][0], shapes[second][:2]
        flattened = len(shapes[first]) == 4 and len(shapes[second]) == 2 and reads % units == 0
        if len(shapes[first]) < len(shapes[second]) or not (reads == units or flattened):
            return False
    return True


def _numbers(name: str) -> list[tuple[int, str]]:
    """Natural order: `fc10` after `fc9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _owner(name: str, vector: str, order: list[str], shapes: Shapes) -> int:
    """The layer whose units a 1-D tensor describes."""
    module = vector.rpartition(".")[0]
    number = re.findall(r"\d+", module)
    same = [k for k, weight in enumerate(order) if weight.rpartition(".")[0] == module]
    alike = [k for k, weight in enumerate(order) if number and re.findall(r"\d+", weight) == number]
    pattern = re.sub(r"\d+", "#", module)
    sequential = [
        k
        for k, weight in enumerate(order)
        if re.sub(r"\d+", "#", weight.rpartition(".")[0]) == pattern and _numbers(weight) < _numbers(vector)
    ]
    for candidates in (same, sequential[-1:], alike):
        fitting = [k for k in candidates if shapes[order[k]][0] == shapes[vector][0]]
        if len(fitting) == 1:
            return fitting[0]
    raise PlanError(
        f"cannot tell which layer {vector} {tuple(shapes[vector])} belongs to",
        where=f"architecture {name}",
        fix=_FIX,
    )
