"""Singular values brought to where they should be, singular vectors left as they are.

Legend: m rows and n columns of a weight, r = min(m, n) directions, T tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergetool.kernels.spectral import Factors, live_factors


def with_its_nuclear_norm(delta: Tensor, share: float) -> Factors:
    """The fewest leading directions whose singular values add up to `share` of all, made so long that all do."""
    sums = _values(delta).cumsum(0)
    if not len(sums):
        return live_factors(delta, 1)
    count = int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1
    kept = live_factors(delta, count)
    return kept.scaled(float(sums[-1] / kept.s.sum()))


def _values(delta: Tensor) -> Tensor:
    """Singular values that are no rounding; of float32 from the Gram matrix, which tells those as well."""
    if delta.dtype != torch.float32:
        return live_factors(delta, min(delta.shape)).s
    exact = delta.to(torch.float64)
    gram = exact.mT @ exact if delta.shape[0] >= delta.shape[1] else exact @ exact.mT
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    live: Tensor = values[values > max(delta.shape) * torch.finfo(delta.dtype).eps * values[:1]]
    return live


def lifted(change: Tensor, share: float) -> Tensor:
    """No singular value smaller than the one with which they add up to `share` of their sum; float64."""
    factors = live_factors(change, min(change.shape))
    if not factors.rank:
        return factors.dense()
    sums = factors.s.cumsum(0)
    least = factors.s[int((sums < share * sums[-1] * (1 - 1e-12)).sum())]
    return Factors(factors.u, factors.s.clamp(min=least), factors.v).dense()


def calibrated(change: Tensor, deltas: Sequence[Tensor], least: float) -> tuple[Tensor, Tensor]:
    """Every direction of a merge (m, n) as strong as tasks have it on average, and the factors (r,); float64.

    In direction u_r the merge does a_r = u_r^T M and task t wants a_rt = u_r^T D_t: <a_r, a_rt> / |a_rt|^2 is how many
    times over it gets that. The factor is T over the sum of these numbers, each at least `least`.
    """
    factors = live_factors(change, min(change.shape))
    done = factors.v.mT * factors.s[:, None]
    total = torch.zeros_like(factors.s)
    for delta in deltas:
        wanted = factors.u.mT @ delta.to(torch.float64)
        size = wanted.square().sum(1)
        met = torch.where(size > 0, (done * wanted).sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny), 0)
        total += met.clamp(min=least)
    gains = len(deltas) / total
    return Factors(factors.u, factors.s * gains, factors.v).dense(), gains
