"""What every operation of a traced graph says about the axes of its operands.

One rule per ATen operation: from the axes of the operands to the axes of the results, declaring on the way what must be
permuted alike and what cannot move. An operation without a rule pins all its operands: safe, and seldom needed, for the
operations that occur in practice are few.

Reference: the C2M3 specification, section 4.10; torch-pruning's dependency graph (Fang et al., CVPR 2023) is a cousin.
"""

import logging

from mergetool.arch.atoms import ONE, Axis, fresh, part_of, pin, regroup, size_of, unify
from mergetool.arch.call import Axes, Call, Rule, broadcast, dim_of, stuck
from mergetool.arch.moves import MOVES

_log = logging.getLogger(__name__)


def results_of(name: str, call: Call, *, pointwise: bool) -> list[Axes]:
    """The axes of the results of the ATen operation `name`; every declaration is made on the way."""
    if any(0 in shape for shape in call.shapes):
        return _unknown(call)
    rule = RULES.get(name.rstrip("_")) or (_pointwise if pointwise else None)
    if rule is None:
        _log.debug("no rule for %s: the axes of its operands stay fixed", name)
        return _unknown(call)
    return rule(call)


def _unknown(call: Call) -> list[Axes]:
    for axes in call.tensors():
        for axis in axes:
            pin(axis)
    return [stuck(shape) for shape in call.shapes]


def _nothing(_: Call) -> list[Axes]:
    return []


def _uniform(call: Call) -> list[Axes]:
    """A constant tensor looks the same after any permutation."""
    return [[fresh(size) for size in shape] for shape in call.shapes]


def _pointwise(call: Call) -> list[Axes]:
    return [broadcast(call.tensors(), shape) for shape in call.shapes]


def _matmul(call: Call) -> list[Axes]:
    a, b = list(call["self"]), list(call["other"] or call["mat2"])
    unify(a[-1], b[-2] if len(b) > 1 else b[0])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    batch = call.shape[: len(call.shape) - len(rows) - len(columns)]
    return [broadcast([a[:-2], b[:-2]], batch) + rows + columns]


def _addmm(call: Call) -> list[Axes]:
    a, b = call["mat1"] or call["batch1"], call["mat2"] or call["batch2"]
    unify(a[-1], b[-2])
    product = [*broadcast([a[:-2], b[:-2]], call.shape[:-2]), a[-2], b[-1]]
    return [broadcast([product, call["self"]], call.shape)]


def _linear(call: Call) -> list[Axes]:
    x, weight = call["input"], call["weight"]
    unify(x[-1], weight[1])
    if call["bias"]:
        unify(call["bias"][0], weight[0])
    return [[*x[:-1], weight[0]]]


def _einsum(call: Call) -> list[Axes]:
    left, right = call["equation"].replace(" ", "").split("->")
    letters: dict[str, Axis] = {}
    for term, axes in zip(left.split(","), call["tensors"], strict=True):
        for letter, axis in zip(_letters(term, len(axes)), axes, strict=True):
            if size_of(letters.get(letter, ONE)) == 1:
                letters[letter] = axis
            elif size_of(axis) > 1:
                unify(letters[letter], axis)
    return [[letters[letter] for letter in _letters(right, len(call.shape))]]


def _letters(term: str, rank: int) -> list[str]:
    """One label per axis; those that an ellipsis stands for are counted from its right end, as broadcasting does."""
    first, ellipsis, last = term.partition("...")
    unnamed = rank - len(first) - len(last) if ellipsis else 0
    return [*first, *(f"...{k}" for k in range(unnamed, 0, -1)), *last]


def _convolution(call: Call) -> list[Axes]:
    x, weight, groups = call["input"], call["weight"], call["groups"] or 1
    spatial = len(weight) - 2
    for axis in (*x[-spatial:], *weight[2:]):
        pin(axis)
    channels = x[-spatial - 1]
    if groups == 1:
        unify(channels, weight[1])
    else:
        outer, inner = regroup([channels], [groups, size_of(channels) // groups])
        rows, _ = regroup([weight[0]], [groups, size_of(weight[0]) // groups])
        unify(outer, rows)
        unify(inner, weight[1])
    if call["bias"]:
        unify(call["bias"][0], weight[0])
    return [[*x[: -spatial - 1], weight[0], *stuck(call.shape[-spatial:])]]


def _attention(call: Call) -> list[Axes]:
    query, key, value = call["query"], call["key"], call["value"]
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    unify(key[-3], value[-3])
    if call["is_causal"]:
        pin(query[-2])
        pin(key[-2])
    if call["enable_gqa"] and size_of(query[-3]) != size_of(key[-3]):
        kv = size_of(key[-3])
        outer, _ = regroup([query[-3]], [kv, size_of(query[-3]) // kv])
        unify(outer, key[-3])
        batch = [*broadcast([query[:-3], key[:-3]], call.shape[:-3]), query[-3]]
    else:
        batch = broadcast([query[:-2], key[:-2]], call.shape[:-2])
    if call["attn_mask"]:
        broadcast([[*batch, query[-2], key[-2]], call["attn_mask"]], [*call.shape[:-1], size_of(key[-2])])
    return [[*batch, query[-2], value[-1]]]


def _layer_norm(call: Call) -> list[Axes]:
    x = call["input"]
    for gain in (call["weight"], call["bias"]):
        for axis, normalised in zip(gain or [], x[len(x) - len(gain or []) :], strict=True):
            unify(axis, normalised)
    return [list(x), *[stuck(shape) for shape in call.shapes[1:]]]


def _batch_norm(call: Call) -> list[Axes]:
    x = call["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name]:
            unify(call[name][0], x[1])
    return [list(x), *[stuck(shape) for shape in call.shapes[1:]]]


def _group_norm(call: Call) -> list[Axes]:
    x = call["input"]
    regroup([x[1]], [call["num_groups"], size_of(x[1]) // call["num_groups"]])
    for name in ("weight", "bias"):
        if call[name]:
            unify(call[name][0], x[1])
    return [list(x)]


def _prelu(call: Call) -> list[Axes]:
    x, slope = call["self"], call["weight"]
    if size_of(slope[0]) > 1:
        unify(slope[0], x[1])
    return [list(x)]


def _reduce(call: Call) -> list[Axes]:
    x, dims = call["self"], call["dim"]
    dims = [dims] if isinstance(dims, int) else dims or range(len(x))
    reduced = {dim_of(dim, len(x)) for dim in dims}
    kept = [ONE if k in reduced else axis for k, axis in enumerate(x) if call["keepdim"] or k not in reduced]
    return [kept] + [stuck(shape) for shape in call.shapes[1:]]


def _pool(spatial: int) -> Rule:
    def rule(call: Call) -> list[Axes]:
        x = call.tensors()[0]
        for axis in x[-spatial:]:
            pin(axis)
        return [[*x[:-spatial], *stuck(shape[-spatial:])] for shape in call.shapes]

    return rule


def _glu(call: Call) -> list[Axes]:
    x = list(call["self"])
    dim = dim_of(-1 if call["dim"] is None else call["dim"], len(x))
    half = size_of(x[dim]) // 2
    first, second = (part_of(x[dim], start, start + half) for start in (0, half))
    unify(first, second)
    x[dim] = first
    return [x]


def _embedding(call: Call) -> list[Axes]:
    weight = call["weight"]
    pin(weight[0])
    return [[*call["indices"], weight[1]]]


_ALIKE = {
    _pointwise: "masked_fill where lerp clamp relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign"
    " hardswish hardsigmoid hardtanh hardshrink softshrink logsigmoid threshold",
    _prelu: "prelu",
    _matmul: "matmul mm bmm",
    _addmm: "addmm baddbmm",
    _linear: "linear",
    _einsum: "einsum",
    _convolution: "conv1d conv2d conv3d",
    _attention: "scaled_dot_product_attention",
    _layer_norm: "layer_norm rms_norm native_layer_norm",
    _batch_norm: "batch_norm _native_batch_norm_legit_no_training",
    _group_norm: "group_norm",
    _reduce: "mean sum amax amin var std logsumexp any all linalg_vector_norm",
    _glu: "glu",
    _embedding: "embedding",
    _nothing: "_assert_tensor_metadata _assert_async sym_size sym_numel sym_stride sym_constrain_range",
    _uniform: "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full"
    " scalar_tensor",
}
RULES: dict[str, Rule] = MOVES | {name: rule for rule, names in _ALIKE.items() for name in names.split()}
RULES |= {
    f"{kind}_pool{spatial}d": _pool(spatial)
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "max_with_indices")
    for spatial in (1, 2, 3)
}
