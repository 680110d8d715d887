"""What each entry gets for its rank among the magnitudes of its row.

On a CPU a float32 magnitude and its place make one whole number of 64 bits, and sorting such numbers is several times
as fast as sorting floats together with their places. The front of a magnitude and its place make one of 32 bits, which
are sorted in half that time: neighbours that then stand the wrong way round are swapped, and rows that have more of
them than that mends are sorted by whole magnitudes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Scratch = Callable[[str, torch.dtype], Tensor]

_MAGNITUDE = 0x7FFFFFFF
_SPAN = (1 << 27) - 1
"""How far magnitudes as whole numbers lie apart over 16 octaves: what is below the uppermost has one front."""
_LONG = 1 << 13
"""Length of rows from which on places leave too little room for fronts."""
_ROUNDS = 4


def spread_by_rank_(x: Tensor, values: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """Fill `out` (rows, n): where |x| has rank j in its row (0 is the smallest), `values[j]` (n,).

    Equal magnitudes are ranked in the order of their places. `scratch(name, dtype)` gives temporaries of the size of x.
    """
    return out.scatter_(1, _order(x, scratch), values.expand(len(x), -1))


def _order(x: Tensor, scratch: Scratch) -> Tensor:
    """The places of every row, smallest magnitude first, (rows, n)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.abs().sort(dim=1, stable=True).indices
    bits = torch.bitwise_and(x.view(torch.int32), _MAGNITUDE, out=scratch("magnitudes", torch.int32).view(x.shape))
    order = scratch("order", torch.int64).view(x.shape)
    if x.shape[1] > _LONG:
        return _by_all(bits, order)
    keys = scratch("keys", torch.int32).view(x.shape)
    order.copy_(_by_front(bits, keys))
    torch.gather(bits, 1, order, out=keys)
    if len(wrong := _swapped(order.numpy(), keys.numpy())):
        rows = torch.from_numpy(np.unique(wrong // x.shape[1]))
        order[rows] = _by_all(bits[rows], order[rows])
    return order


def _by_front(bits: Tensor, keys: Tensor) -> Tensor:
    """Places in the order of the first bits of magnitudes, as many as there is room for; they lie in `keys`."""
    length = bits.shape[1]
    front = -1 << (length - 1).bit_length()
    torch.sub(bits, max(0, int(bits.max()) - _SPAN), out=keys).clamp_(min=0)
    keys.bitwise_left_shift_(4).bitwise_and_(front).bitwise_or_(torch.arange(length, dtype=torch.int32))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(~front)


def _swapped(order: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Swap neighbours of a row, few times, towards ascending magnitudes, those found there: what is still wrong."""
    length, (order, found) = found.shape[1], (each.reshape(-1) for each in (order, found))
    for left in reversed(range(_ROUNDS)):
        wrong = np.flatnonzero(found[1:] < found[:-1])
        wrong = wrong[(wrong + 1) % length != 0]  # the last of one row and the first of the next are no neighbours
        if not len(wrong) or not left:
            break
        wrong = wrong[np.diff(wrong, prepend=-2) > 1]  # an entry is in one swap at a time
        for each in (order, found):
            each[wrong], each[wrong + 1] = each[wrong + 1], each[wrong]
    return wrong


def _by_all(bits: Tensor, order: Tensor) -> Tensor:
    """Fill `order` with places in the order of whole magnitudes."""
    order.copy_(bits).bitwise_left_shift_(32).bitwise_or_(torch.arange(bits.shape[1]))
    order.numpy().sort(axis=1)
    return order.bitwise_and_(0xFFFFFFFF)
