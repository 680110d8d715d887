"""Two adapters, compared by what they add to the weights: the same change has many pairs of factors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.engine.comparing import NOISE_OF_MATRICES, Compared
from mergetool.engine.opposites import Matched
from mergetool.kernels.last_place import SEVERAL, distance
from mergetool.planning.graph import SLICE_ELEMENTS
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of


def compare_adapters(made: AdapterAlone, found: AdapterAlone) -> tuple[Matched, dict[str, Compared]]:
    """What the recipe has made, and what is there. A product that only one of them has must be zero."""
    pairs, compared = Matched(found), {}
    for name in dict.fromkeys([*made.specs, *found.specs]):
        shapes = [each.specs[name].shape for each in (made, found) if name in each.specs]
        if len(shapes) == 1 and not all(each.sites[name].is_product for each in (made, found) if name in each.specs):
            pairs.problems.append(
                f"it {'lacks' if name in made.specs else 'has, and the recipe does not make,'} {name}"
            )
        elif shapes[0] != shapes[-1]:
            pairs.problems.append(f"{name} is {list(shapes[1])} here, {list(shapes[0])} by the recipe")
        else:
            compared[name] = _compared(name, made, found)
    return pairs, compared


def _compared(name: str, made: AdapterAlone, found: AdapterAlone) -> Compared:
    spec = (made if name in made.specs else found).specs[name]
    result = Compared(name, spec.num_elements)
    stored = [torch_dtype(each.stored_as(name)) for each in (made, found) if name in each.specs]
    wanted = max(stored, key=lambda dtype: torch.finfo(dtype).eps)
    noise = max(NOISE_OF_MATRICES, SEVERAL * torch.finfo(wanted).eps)  # factors are rounded, products add that up
    for start, expected, values in _slices(name, spec.num_elements, made, found):
        told = distance(expected, values, wanted, noise)
        if told.other:
            result.add(told, start, expected, values, ())
    return result


def _slices(name: str, total: int, made: AdapterAlone, found: AdapterAlone) -> Iterator[tuple[int, Tensor, Tensor]]:
    for start in range(0, total, SLICE_ELEMENTS):
        count = min(SLICE_ELEMENTS, total - start)
        expected = _read(made, name, start, count)
        wide = torch.promote_types(expected.dtype, torch.float32)
        yield start, expected.to(wide), _read(found, name, start, count)


def _read(adapter: AdapterAlone, name: str, start: int, count: int) -> Tensor:
    """Elements of what an adapter adds, zeros where it adds nothing."""
    if name not in adapter.specs:
        return torch.zeros(count)
    dtype = adapter.specs[name].dtype
    values = torch.empty(count, dtype=torch_dtype(dtype))
    adapter.read_bytes(name, start * dtype.bits // 8, bytes_of(values))
    return values
