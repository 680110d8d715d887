"""Merged updates with a flat spectrum: every direction that the tasks use gets the same strength.

Adding up task vectors makes a few shared directions very strong, and those drown what is particular to single tasks.
Iso-C keeps the singular vectors of the sum and replaces all its singular values by their mean. Iso-CTS gives up the
weakest common directions and spends them on the strongest ones that each task has outside the common space.

Legend: m rows and n columns of a weight, r = min(m, n), c common directions, q directions particular to each task.

Reference: Marczak et al., No Task Left Behind, ICML 2025, https://arxiv.org/abs/2502.04959, sections 4 and 5.
Differs from the paper: directions in which nothing changed are left out, where the authors' code flattens rounding
noise up to full strength.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergetool.kernels.spectral import Factors, concatenated, live_factors, orthogonalised


def isotropic(total: Tensor, size: int) -> Tensor:
    """Iso-C of a sum of task vectors: its polar factor times the mean of its r singular values; float64.

    It may be a core of that sum (m, n): `size` is r.
    """
    factors = live_factors(total, min(total.shape))
    return (factors.u @ factors.v.mT) * (factors.s.sum() / size)


def isotropic_in_spaces(deltas: Sequence[Tensor], common: float, size: int) -> Tensor:
    """Iso-CTS of task vectors; float64. `common` in [0, 1] is the share of directions that are common.

    They may be cores of matrices (m, n): `size` is r.
    """
    num_common, num_own = space_sizes(size, len(deltas), common)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    every = live_factors(total, min(total.shape))
    own = [_outside(delta, every.u, num_common, num_own) for delta in deltas] if num_own else []
    shared = every.leading(num_common)
    merged = orthogonalised(concatenated([*own, shared]))
    return (merged.u @ merged.v.mT) * (merged.s.sum() / size)


def space_sizes(size: int, num_tasks: int, common: float) -> tuple[int, int]:
    """How many of `size` directions are common (c), and how many each task gets of its own (q): c + q * tasks = size.

    The share is moved to the nearest c for which that comes out even.
    """
    num_own = round((size - int(size * common)) / num_tasks)  # half to even, as in the authors' code
    num_own = min(num_own, size // num_tasks)
    return size - num_own * num_tasks, num_own


def _outside(delta: Tensor, basis: Tensor, first: int, count: int) -> Factors:
    """The leading triplets of what `delta` writes outside the span of the `first` columns of `basis`, orthonormal.

    Where these are all directions that there are, it is looked at in the few others.
    """
    exact = delta.to(torch.float64)
    known, others = basis[:, :first], basis[:, first:]
    whole = basis.shape[0] == basis.shape[1]
    rest = others.mT @ exact if whole else torch.addmm(exact, known, known.mT @ exact, alpha=-1)
    if not rest.is_cpu:
        rest = rest.to(delta.dtype)  # where products find directions, and finer than they is only noise
    noise = max(delta.shape) * torch.finfo(delta.dtype).eps * float(torch.linalg.matrix_norm(exact))
    factors = live_factors(rest, min(count, *rest.shape))
    factors = factors.leading(int((factors.s > noise).sum()))
    return Factors(others @ factors.u, factors.s, factors.v) if whole else factors
