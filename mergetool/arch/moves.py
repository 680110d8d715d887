"""Rules for operations that move, cut and join axes without computing anything."""

from itertools import pairwise

from mergetool.arch.atoms import ONE, Axis, choose, fresh, part_of, pin, regroup, resolve, size_of
from mergetool.arch.call import Axes, Call, Rule, broadcast, dim_of, stuck


def _same(call: Call) -> list[Axes]:
    return [list(call.tensors()[0])] * len(call.shapes)


def _reshape(call: Call) -> list[Axes]:
    return [regroup(call["self"], call.shape)]


def _permute(call: Call) -> list[Axes]:
    x = call["self"]
    return [[x[dim_of(dim, len(x))] for dim in call["dims"]]]


def _transpose(call: Call) -> list[Axes]:
    x = list(call["self"])
    first, second = (dim_of(call[name], len(x)) for name in ("dim0", "dim1"))
    x[first], x[second] = x[second], x[first]
    return [x]


def _reverse(call: Call) -> list[Axes]:
    x = list(call["self"])
    return [x[:-2] + x[:-3:-1]] if len(x) > 1 else [x]


def _expand(call: Call) -> list[Axes]:
    """New copies along an axis look the same after any permutation of them."""
    x = call["self"]
    new = len(call.shape) - len(x)
    kept = [axis if size_of(axis) == size else fresh(size) for axis, size in zip(x, call.shape[new:], strict=True)]
    return [[fresh(size) for size in call.shape[:new]] + kept]


def _repeat(call: Call) -> list[Axes]:
    x, repeats = call["self"], call["repeats"]
    return [[_tiled(axis, times) for axis, times in zip([ONE] * (len(repeats) - len(x)) + x, repeats, strict=True)]]


def _tiled(axis: Axis, times: int) -> Axis:
    axis = resolve(axis)
    if times == 1:
        return axis
    if len(axis) > 1:
        pin(axis)
        return fresh(size_of(axis) * times, pinned=True)
    return (fresh(times)[0] + axis[0],)


def _repeat_interleave(call: Call) -> list[Axes]:
    x = list(call["self"])
    dim = dim_of(call["dim"], len(x))
    copies = fresh(call["repeats"])[0]
    x[dim] = tuple(product + copies for product in resolve(x[dim]))
    return [x]


def _cat(call: Call) -> list[Axes]:
    tensors = [axes for axes in call["tensors"] if len(axes) == len(call.shape)]
    dim = dim_of(call["dim"] or 0, len(call.shape))
    rest = [axes[:dim] + axes[dim + 1 :] for axes in tensors]
    joined = broadcast(rest, [size for k, size in enumerate(call.shape) if k != dim])
    along = tuple(product for axes in tensors for product in axes[dim])
    return [[*joined[:dim], along, *joined[dim:]]]


def _stack(call: Call) -> list[Axes]:
    dim = dim_of(call["dim"] or 0, len(call.shape))
    joined = broadcast(call["tensors"], [size for k, size in enumerate(call.shape) if k != dim])
    return [[*joined[:dim], fresh(call.shape[dim], pinned=True), *joined[dim:]]]


def _select(call: Call) -> list[Axes]:
    x = call["self"]
    dim = dim_of(call["dim"], len(x))
    return [choose(list(x), dim, call["index"] % size_of(x[dim]))]


def _unbind(call: Call) -> list[Axes]:
    x = call["self"]
    dim = dim_of(call["dim"] or 0, len(x))
    return [choose(list(x), dim, index) for index in range(size_of(x[dim]))]


def _slice(call: Call) -> list[Axes]:
    x = list(call["self"])
    dim = dim_of(call["dim"] or 0, len(x))
    size = size_of(x[dim])
    start, stop = _clamped(call["start"], size, 0), _clamped(call["end"], size, size)
    if (call["step"] or 1) != 1:
        pin(x[dim])
        x[dim] = fresh(call.shape[dim], pinned=True)
        return [x]
    return [_pieces(x, dim, [(start, stop)])[0]]


def _clamped(bound: int | None, size: int, default: int) -> int:
    bound = default if bound is None else bound
    return max(0, min(size, bound + size if bound < 0 else bound))


def _split(call: Call) -> list[Axes]:
    x = call["self"]
    dim = dim_of(call["dim"] or 0, len(x))
    stops = [0]
    for shape in call.shapes:
        stops.append(stops[-1] + shape[dim])
    return _pieces(list(x), dim, list(pairwise(stops)))


def _pieces(x: Axes, dim: int, bounds: list[tuple[int, int]]) -> list[Axes]:
    """Slices of one axis. Pieces of length 1 are choices: what lies within them may differ from piece to piece."""
    pieces = []
    for start, stop in bounds:
        if stop - start == 1 and size_of(x[dim]) > 1:
            left = choose(x, dim, start)
            pieces.append([*left[:dim], ONE, *left[dim:]])
        else:
            pieces.append([*x[:dim], part_of(x[dim], start, stop), *x[dim + 1 :]])
    return pieces


def _pad(call: Call) -> list[Axes]:
    """Zeros around an axis are new coordinates that look alike."""
    x = list(call["self"])
    pads = list(call["pad"])
    for back, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
        if low < 0 or high < 0 or call["mode"] not in (None, "constant"):
            pin(x[-back])
            x[-back] = fresh(call.shape[-back], pinned=True)
        else:
            x[-back] = (fresh(low) if low else ()) + x[-back] + (fresh(high) if high else ())
    return [x]


def _take(call: Call) -> list[Axes]:
    """Indexing with tensors: the indexed axes cannot move, the others are carried along."""
    x, indices = call["self"], list(call["indices"])
    indexed = [k for k, index in enumerate(indices) if index is not None]
    for k in indexed:
        pin(x[k])
    kept = [axis for k, axis in enumerate(x) if k not in indexed]
    new = stuck(call.shape[: len(call.shape) - len(kept)])
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if together else 0
    return [[*kept[:at], *stuck(call.shape[at : at + len(new)]), *kept[at:]]]


def _along(call: Call) -> list[Axes]:
    """Operations in which the order along one axis matters: it cannot move, the others are carried along."""
    x = list(call["self"])
    dims = call["dim"] if call["dim"] is not None else call["dims"]
    for dim in [dims] if isinstance(dims, int) else dims if dims else range(len(x)):
        pin(x[dim_of(dim, len(x))])
    return [list(x)] * len(call.shapes)


_ALIKE = {
    _same: "dropout to contiguous clone alias detach lift_fresh_copy _to_copy softmax log_softmax _softmax _log_softmax"
    " type_as feature_dropout alpha_dropout",
    _reshape: "view reshape _unsafe_view flatten unflatten squeeze unsqueeze",
    _permute: "permute",
    _transpose: "transpose swapaxes swapdims",
    _reverse: "t mT numpy_T",
    _expand: "expand expand_as broadcast_to",
    _repeat: "repeat",
    _repeat_interleave: "repeat_interleave",
    _cat: "cat concat concatenate",
    _stack: "stack",
    _select: "select",
    _unbind: "unbind",
    _slice: "slice",
    _split: "split split_with_sizes chunk tensor_split",
    _pad: "pad constant_pad_nd",
    _take: "index",
    _along: "cumsum cumprod flip roll sort",
}
MOVES: dict[str, Rule] = {name: rule for rule, names in _ALIKE.items() for name in names.split()}
