"""The leading directions of a large matrix and a summary of its spectrum, at the price of a few products.

A block of random vectors is sent through the matrix and back, which turns it towards the leading directions; the
matrix within the space that is found has the leading singular values (Halko, Martinsson and Tropp, 2011), to a per
cent where they stand out, and some per cent too small where none does. The sum of fourth powers, which effective rank
asks for, comes from these values and random probes of what they leave out (Hutch++, Meyer et al. 2021). Four products
with a few dozen columns is all that it costs. Small matrices are decomposed in float64.

Legend: m rows and n columns; k leading directions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.kernels.rng import normal, stream_key
from mergetool.kernels.spectral import Factors, with_signs

_BESIDE = 8
"""Directions that a search carries beside those asked for."""
_PROBES = 8
_SMALL = 192
"""Smaller dimension up to which a matrix is decomposed."""
_ROUNDING = 1e-6
"""Singular values below this share of the largest are rounding."""
_ROOM = 1e28
"""Squared norm up to which all products with a matrix have room in float32."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is known of the singular values s of a matrix."""

    leading: Tensor
    """The largest values, (k,)."""
    shape: tuple[int, int]
    norm2: float
    """The sum of s^2."""
    fourth: float
    """The sum of s^4."""

    @property
    def effective_rank(self) -> float:
        """(sum s^2)^2 / sum s^4: how many directions of equal size would have these sums."""
        return self.norm2**2 / self.fourth if self.fourth else math.nan

    @property
    def stable_rank(self) -> float:
        """sum s^2 / s_1^2."""
        return self.norm2 / float(self.leading[0]) ** 2 if len(self.leading) else math.nan

    @property
    def edge(self) -> float:
        """s_1 over the largest singular value of noise of the same norm, which is where its spectrum ends.

        For independent entries of variance v that is sqrt(v) (sqrt(m) + sqrt(n)) (Marchenko and Pastur, 1967).
        """
        m, n = self.shape
        if not len(self.leading):
            return math.nan
        return float(self.leading[0]) / (math.sqrt(self.norm2 / (m * n)) * (math.sqrt(m) + math.sqrt(n)))

    def energy(self, k: int) -> float:
        """The share of the squared norm in the k leading directions."""
        return min(1.0, float(self.leading[:k].double().square().sum()) / self.norm2) if self.norm2 else math.nan


def spectrum(delta: Tensor, k: int, seed: int = 0) -> tuple[Factors, Spectrum]:
    """At most k leading directions of a matrix (m, n), fewer where there are no more; and its spectrum."""
    m, n = delta.shape
    norm2 = _norm2(delta)
    if not norm2 < _ROOM:
        delta = delta.double()
        norm2 = _norm2(delta)
    if norm2 == 0:
        nothing = Factors(delta.new_zeros(m, 0), delta.new_zeros(0), delta.new_zeros(n, 0))
        return nothing, Spectrum(nothing.s, (m, n), 0.0, 0.0)
    if min(m, n) <= _SMALL:
        return _decomposed(delta.double(), k)
    block = normal(stream_key(seed, "sketch"), 0, delta.new_empty(n, k + _BESIDE + _PROBES))
    through = ((delta @ block).mT @ delta).mT  # so, not turned: a third of the time
    basis = torch.linalg.qr(delta @ torch.linalg.qr(through[:, :-_PROBES])[0])[0]
    u, s, vh = torch.linalg.svd(basis.mT @ delta, full_matrices=False)
    probes = through[:, -_PROBES:]
    left = probes - vh.mT @ (vh @ probes)  # R^T R g for what the basis leaves out, R: E |R^T R g|^2 is the sum of s^4
    fourth = float(s.double().pow(4).sum() + left.double().square().sum() / _PROBES)
    leading = _live(basis @ u[:, :k], s[:k], vh[:k].mT).to(torch.float32)
    return leading, Spectrum(leading.s, (m, n), norm2, fourth)


def _norm2(delta: Tensor) -> float:
    return float(torch.linalg.vector_norm(delta, dim=1).double().square().sum())


def _decomposed(delta: Tensor, k: int) -> tuple[Factors, Spectrum]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    leading = _live(u[:, :k], s[:k], vh[:k].mT).to(torch.float32)
    shape = delta.shape[0], delta.shape[1]
    return leading, Spectrum(leading.s, shape, float(s.square().sum()), float(s.pow(4).sum()))


def _live(u: Tensor, s: Tensor, v: Tensor) -> Factors:
    return with_signs(Factors(u, s.clamp(max=torch.finfo(torch.float32).max), v)).live(_ROUNDING)


def shared(one: Tensor, other: Tensor) -> float:
    """The share of two subspaces, given by orthonormal columns, that they have in common: 0 to 1."""
    k = min(one.shape[1], other.shape[1])
    return float((one.mT @ other).square().sum()) / k if k else math.nan
