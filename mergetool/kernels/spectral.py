"""Task vectors by their singular vectors: compress each, remove the interference between them, add up.

A task vector (fine-tuned minus base) of one weight matrix is nearly low-rank, so each task keeps its k leading singular
triplets. Laid side by side, the singular vectors of different tasks are not orthogonal, and what one task writes the
others read. Replacing the concatenation U = [U_1 ... U_T] by the nearest matrix with orthonormal columns, and V
likewise, removes that: M = U' diag(s) V'^T, with all singular values unchanged.

The nearest orthonormal matrix is the polar factor U (U^T U)^(-1/2), so with S = diag(s) and Gram matrices Gu, Gv

    M = U C V^T,     core C = Gu^(-1/2) S Gv^(-1/2)     (K, K), K = all kept triplets together

and a merge of any subset of tasks needs only its core: the factors stay as they are.

Everything here is computed in float64. Truncated factors come from the Gram matrix of the smaller side and one
Rayleigh-Ritz step, which is as exact as a full SVD; the polar factor comes from the Gram matrix unless that is too
ill-conditioned to trust, and then from a singular value decomposition of U itself.

Legend: m rows and n columns of a weight, k triplets of one task, K triplets of all tasks together.

Reference: Gargiulo et al., Task Singular Vectors, CVPR 2025, https://arxiv.org/abs/2412.00081, sections 3 and 4.
Differs from the paper: directions that carry nothing (of zero or rank-deficient task vectors, of experts that are
copies of each other) are left out instead of being filled with arbitrary orthonormal vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from mergetool.kernels.eigen import add_gram_, checked_eigh, gram_eigh
from mergetool.kernels.halley import nearest_orthonormal
from mergetool.kernels.subspace import leading_spaces

NULL_DIRECTION = 1e-8
"""Singular values of U (V) below this share of the largest count as 0. Real fine-tunes come down to 3e-7."""

_TRUSTED = 1e-8
"""Smallest eigenvalue of a Gram matrix, over the largest, whose inverse square root is right to about 1e-7."""

_TOGETHER = 8
"""Most matrices that are looked at together: more do not fill a device better, and take memory."""
_SMALLEST = 512
"""Smaller dimension below which decompositions take a device no longer than products do."""
_NARROW = 6
"""How many times the directions wanted must fit into it for these to be found by products."""

Rank = Literal["auto"] | int | float | Mapping[Literal["energy"], float]
"""Directions kept of a task vector: auto (as many as fit side by side), a number, a share, or {energy: share}."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix as u diag(s) v^T: u (m, k), s (k,), v (n, k)."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """Number of triplets kept, k."""
        return self.s.shape[0]

    @property
    def mT(self) -> Self:  # noqa: N802 (as in torch)
        """The transposed matrix."""
        return type(self)(self.v, self.s, self.u)

    def leading(self, k: int) -> Self:
        """The first k triplets (all, if there are fewer)."""
        return type(self)(self.u[:, :k], self.s[:k], self.v[:, :k])

    def scaled(self, factor: float) -> Self:
        """The matrix times `factor`."""
        return type(self)(self.u, self.s * factor, self.v)

    def to(self, dtype: torch.dtype) -> Self:
        """The same factors in another dtype."""
        return type(self)(self.u.to(dtype), self.s.to(dtype), self.v.to(dtype))

    def dense(self) -> Tensor:
        """The matrix itself, (m, n), in the factors' dtype."""
        return (self.u * self.s) @ self.v.mT

    def live(self, noise: float) -> Self:
        """The triplets with s > noise s[0]."""
        return self.leading(int((self.s > noise * self.s[0]).sum()))


def truncated_svd(delta: Tensor, k: int) -> Factors:
    """The k leading singular triplets of `delta` (m, n), in float64, s descending; s may hold zeros.

    Signs are such that the largest entry of every left vector is positive, whatever the machine's BLAS does.

    Leading dimensions of `delta` are those of a batch. Raises ValueError if k is not in 1..min(m, n), or `delta` is not
    finite.
    """
    if delta.shape[-2] < delta.shape[-1]:
        return with_signs(_truncated_svd(delta.mT, k).mT)
    return with_signs(_truncated_svd(delta, k))


def _truncated_svd(delta: Tensor, k: int) -> Factors:
    delta = delta.to(torch.float64)
    _, right = gram_eigh(delta, k)
    # Rayleigh-Ritz: the best triplets within the space found. It measures small singular values at full precision,
    # which the Gram matrix has squared away.
    basis, small = torch.linalg.qr(delta @ right)
    u, s, vh = torch.linalg.svd(small)
    return Factors(basis @ u, s, right @ vh.mT)


def with_signs(factors: Factors) -> Factors:
    """The same matrix, its triplets turned so that the largest entry of every left vector is positive."""
    largest = factors.u.gather(-2, factors.u.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(factors.u.dtype)
    return Factors(factors.u * signs, factors.s, factors.v * signs)


def live_factors(delta: Tensor, k: int) -> Factors:
    """`truncated_svd` without the triplets that are rounding noise: s <= max(m, n) eps(dtype of delta) max(s).

    The rank may therefore be below k; for a zero matrix it is 0.
    """
    if not delta.any():
        empty = delta.new_zeros(0, dtype=torch.float64)
        return Factors(empty.expand(delta.shape[0], 0), empty, empty.expand(delta.shape[1], 0))
    if not delta.is_cpu:
        return next(live_factors_of([delta], k))
    if delta.dtype == torch.float32 and 2 * k > min(delta.shape):
        return with_signs(_all_by_gram(delta, k)).live(_noise(delta))
    return truncated_svd(delta, k).live(_noise(delta))


def live_directions(parts: Sequence[Tensor]) -> Tensor:
    """The left vectors u (m, r) of `live_factors` of matrices (m, n_i) side by side, but for their signs.

    They are not laid side by side where there are fewer rows than columns and float32 lets their Gram matrices do.
    """
    m, n = parts[0].shape[0], sum(part.shape[1] for part in parts)
    if parts[0].dtype != torch.float32 or m > n:
        return live_factors(beside := torch.cat(list(parts), 1), min(beside.shape)).u
    gram = parts[0].new_zeros(m, m, dtype=torch.float64)
    for part in parts:
        add_gram_(gram, part.mT)
    values, vectors = checked_eigh(gram)
    noise = max(m, n) * torch.finfo(torch.float32).eps
    live = int((values > noise**2 * values[-1]).sum())
    return vectors[:, m - live :].flip(1)


def _all_by_gram(delta: Tensor, k: int) -> Factors:
    """`truncated_svd` without a Ritz step (signs are any): right where singular values are no noise of float32."""
    if delta.shape[0] < delta.shape[1]:
        return _all_by_gram(delta.mT, k).mT
    exact = delta.to(torch.float64)
    _, right = gram_eigh(exact, k)
    return _triplets_in(exact @ right, right)


def live_factors_of(deltas: Sequence[Tensor], k: int, *, together: bool | None = None) -> Iterator[Factors]:
    """`live_factors` of matrices of one shape, one after the other.

    They are looked at `together` by default where they are not on the CPU: a device is busy with one call for many
    matrices where one of them leaves most of it idle. A CPU gains nothing.
    """
    if together is None:
        together = not deltas[0].is_cpu
    if not together:
        yield from (live_factors(delta, k) for delta in deltas)
    elif deltas[0].dtype != torch.float32:  # finer than Gram matrices are
        yield from _live_each(truncated_svd(torch.stack(list(deltas)), k), _noise(deltas[0]))
    else:
        for start in range(0, len(deltas), _TOGETHER):
            yield from _live_each(_from_gram(deltas[start : start + _TOGETHER], k), _noise(deltas[0]))


def _live_each(batch: Factors, noise: float) -> list[Factors]:
    """`live` of every matrix of a batch."""
    counts = (batch.s > noise * batch.s[:, :1]).sum(-1).tolist()
    parts = zip(batch.u, batch.s, batch.v, strict=True)
    return [Factors(*each).leading(count) for each, count in zip(parts, counts, strict=True)]


def _noise(delta: Tensor) -> float:
    """The share of the largest singular value up to which others are rounding."""
    return max(delta.shape) * torch.finfo(delta.dtype).eps


def _from_gram(deltas: Sequence[Tensor], k: int) -> Factors:
    """k triplets of each matrix (m, n), side by side, right where they are no noise."""
    m, n = deltas[0].shape
    return with_signs(_from_tall([delta.mT for delta in deltas], k).mT if m < n else _from_tall(deltas, k))


def _from_tall(deltas: Sequence[Tensor], k: int) -> Factors:
    gram = _grams(deltas)
    if not bool(gram.diagonal(dim1=-2, dim2=-1).sum().isfinite()):
        raise ValueError("the matrix holds infinities or not-a-numbers")
    if gram.shape[-1] < _SMALLEST or k * _NARROW > gram.shape[-1]:
        space = checked_eigh(gram)[1][..., -k:].flip(-1)
        return _triplets_in(_images(deltas, space), space)
    space = _leading_space(gram, k, _noise(deltas[0]))
    # The best triplets within the space: those of single directions need not be found yet.
    _, turn = checked_eigh((image := _images(deltas, space)).mT @ image)
    turn = turn.flip(-1)
    return _triplets_in(image @ turn, space @ turn)


def _grams(deltas: Sequence[Tensor]) -> Tensor:
    """(B, n, n), float64, of which the matrices themselves are never there but for one."""
    n = deltas[0].shape[1]
    grams = deltas[0].new_empty(len(deltas), n, n, dtype=torch.float64)
    for delta, gram in zip(deltas, grams, strict=True):
        torch.mm((exact := delta.to(torch.float64)).mT, exact, out=gram)
    return grams


def _images(deltas: Sequence[Tensor], spaces: Tensor) -> Tensor:
    """What each matrix makes of its space: (B, m, k), float64."""
    return torch.stack([delta.to(torch.float64) @ space for delta, space in zip(deltas, spaces, strict=True)])


def _triplets_in(image: Tensor, right: Tensor) -> Factors:
    """Triplets with these right vectors, whose images are orthogonal: up to rounding, in what is no noise itself."""
    s = torch.linalg.vector_norm(image, dim=-2)
    return Factors(image / s.clamp(min=torch.finfo(s.dtype).tiny)[..., None, :], s, right)


def _leading_space(gram: Tensor, k: int, noise: float) -> Tensor:
    """`leading_spaces`, where they are not found from `eigh`."""
    space, found = leading_spaces(gram, k, noise)
    for index, right in enumerate(found):
        if not right:
            space[index] = torch.linalg.eigh(gram[index], UPLO="U")[1][:, -k:]
    return space


def rank_limit(rank: Rank, size: int, num_tasks: int) -> int:
    """At most how many directions of each task vector `rank` keeps of matrices with smaller dimension `size`."""
    match rank:
        case "auto":
            return size // num_tasks
        case int():
            return min(rank, size)
        case float():
            return int(rank * size)
        case _:
            return size


def kept(factors: Factors, rank: Rank) -> Factors:
    """Of the leading factors that `rank_limit` allows, those that hold the share of the energy that is asked for."""
    if isinstance(rank, Mapping) and factors.rank:
        return factors.leading(energy_rank(factors.s, rank["energy"]))
    return factors


def ranks_within(spectra: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """How many leading directions of each matrix to keep, at least one, for all to cost at most `budget`.

    spectra: singular values (k_i,), descending; every direction of matrix i costs costs[i]. What is kept holds as much
    of the matrices' energies as the budget buys, each matrix' energy taken as 1: which matrix matters more is unknown.
    """
    worth = [s.square() / s.square().sum() / cost for s, cost in zip(spectra, costs, strict=True)]
    for values in worth:
        values[:1] = torch.inf
    owner = torch.cat([torch.full_like(values, place) for place, values in enumerate(worth)]).long()
    order = torch.cat(worth).argsort(descending=True, stable=True)
    owner = owner[order]
    spent = torch.tensor(costs, dtype=torch.float64, device=owner.device)[owner].cumsum(0)
    counts = owner[spent <= budget].bincount(minlength=len(costs))
    return [max(1, min(int(count), len(s))) if len(s) else 0 for count, s in zip(counts, spectra, strict=True)]


def energy_rank(s: Tensor, share: float) -> int:
    """The smallest k whose leading singular values hold `share` in (0, 1] of the sum of squares of `s` (descending)."""
    energy = s.square().cumsum(0)
    # The tolerance makes share = 1 mean "all that counts" in spite of rounding.
    return int((energy < energy[-1] * share * (1 - 1e-12)).sum()) + 1


def polar(x: Tensor, *, fill: bool = False) -> Tensor:
    """The nearest matrix to x (m, K) with orthonormal columns (rows, if K > m); float64.

    Where x is rank-deficient there is no nearest one: null directions (see `NULL_DIRECTION`) are left out, so the
    result is the partial isometry with the range of x. `fill=True` puts arbitrary orthonormal directions there.
    """
    if not x.is_cpu and 0 < x.shape[1] <= x.shape[0]:
        # Directions near the limit are not for products to judge: what is not clear comes back as None.
        nearest = nearest_orthonormal(x.to(torch.float64), 10 * NULL_DIRECTION)
        if nearest is not None and not (fill and float(nearest.square().sum()) < x.shape[1] - 0.5):
            return nearest
    elif (whitening := _gram_whitener(x)) is not None:
        return x @ whitening
    p, _, qh, live = _live_svd(x)
    return (p if fill else p * live) @ qh


def damped_polar(x: Tensor, damping: float) -> Tensor:
    """sqrt(1 + e) x (x^T x + e)^(-1/2), e = `damping` > 0, float64.

    Orthonormal columns stay as they are, and what is left between near copies is not raised to full length.
    """
    values, vectors = gram_eigh(x, x.shape[1])
    scale = ((1 + damping) / (values.clamp(min=0) + damping)).sqrt()
    return ((x.to(torch.float64) @ vectors) * scale) @ vectors.mT


def whitener(x: Tensor) -> Tensor:
    """W = (x^T x)^(-1/2), symmetric, (K, K), float64: x W is `polar(x)`. Zero on the null directions of x."""
    if (whitening := _gram_whitener(x)) is not None:
        return whitening
    _, s, qh, live = _live_svd(x)
    return (qh.mT * torch.where(live, 1 / s, 0)) @ qh


def _gram_whitener(x: Tensor) -> Tensor | None:
    """The whitener from the Gram matrix, or None if that is too ill-conditioned.

    A relative error of eps in the Gram matrix turns into one of eps cond(x)^2 in the polar factor.
    """
    if not 0 < x.shape[1] <= x.shape[0]:
        return None
    values, vectors = gram_eigh(x, x.shape[1])
    if values[-1] < _TRUSTED * values[0]:
        return None
    return (vectors * values.rsqrt()) @ vectors.mT


def _live_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Thin SVD of x, and which singular values are not null."""
    p, s, qh = torch.linalg.svd(x.to(torch.float64), full_matrices=False)
    return p, s, qh, s > NULL_DIRECTION * s[:1]


def concatenated(tasks: Sequence[Factors]) -> Factors:
    """Factors of several tasks side by side, in their order (U, S, V above): the sum of the matrices."""
    return Factors(
        torch.cat([factors.u for factors in tasks], 1),
        torch.cat([factors.s for factors in tasks]),
        torch.cat([factors.v for factors in tasks], 1),
    )


def orthogonalised(every: Factors, *, fill: bool = False, damping: float = 0.0) -> Factors:
    """`concatenated` factors with left and right vectors replaced by the nearest orthonormal ones; `.dense()` is M.

    The singular values of M are all of `s`, if K <= min(m, n) and no direction is null. `fill` as in `polar`;
    `damping` > 0 as in `damped_polar`.
    """
    if damping and every.rank:
        return Factors(damped_polar(every.u, damping), every.s, damped_polar(every.v, damping))
    return Factors(polar(every.u, fill=fill), every.s, polar(every.v, fill=fill))


def core(every: Factors) -> Tensor:
    """C (K, K), float64, such that M = U C V^T with the unchanged U and V of `concatenated` factors."""
    return (whitener(every.u) * every.s) @ whitener(every.v)


@dataclass(frozen=True)
class Interference:
    """How much the singular vectors of several tasks get in each other's way; 0 if they are orthogonal."""

    total: float
    """Sum of the absolute entries of (U^T U - I) S (V^T V - I): the measure of the paper."""
    normalised: float
    """`total` / sum of the singular values, comparable between matrices."""


def grams(every: Factors) -> tuple[Tensor, Tensor]:
    """U^T U and V^T V, (K, K), in the factors' dtype."""
    return every.u.mT @ every.u, every.v.mT @ every.v


def interference(every: Factors) -> Interference:
    """Singular task interference of the tasks whose `concatenated` factors these are (paper, section 3.3)."""
    return interference_of(*grams(every), every.s)


def interference_of(gram_left: Tensor, gram_right: Tensor, s: Tensor) -> Interference:
    """The same, of `grams` of the factors and their singular values (K,)."""
    if not s.any():
        return Interference(0.0, 0.0)
    identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
    overlap = ((gram_left - identity) * s) @ (gram_right - identity)
    total = float(overlap.abs().sum())
    return Interference(total, total / float(s.abs().sum()))
