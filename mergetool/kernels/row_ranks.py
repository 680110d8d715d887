"""What each entry gets for its rank among the magnitudes of its row.

On a CPU a float32 magnitude and its place make one whole number of 64 bits, and sorting such numbers is several times
as fast as sorting floats together with their places.
"""

import numpy as np
import torch
from torch import Tensor

_MAGNITUDE = np.int32(0x7FFFFFFF)
_PLACE = np.int64(0xFFFFFFFF)


def spread_by_rank_(x: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Fill `out` (rows, n): where |x| has rank j in its row (0 is the smallest), `values[j]` (n,).

    Equal magnitudes are ranked in the order of their places.
    """
    return out.scatter_(1, _order(x), values.expand(len(x), -1))


def _order(x: Tensor) -> Tensor:
    """The places of every row, smallest magnitude first, (rows, n)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.abs().sort(dim=1, stable=True).indices
    keys = (x.numpy().view(np.int32) & _MAGNITUDE).astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.shape[1])
    keys.sort(axis=1)
    keys &= _PLACE
    return torch.from_numpy(keys)
