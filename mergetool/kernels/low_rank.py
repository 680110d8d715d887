"""Products of two thin matrices, as adapters have them: add up, cut, and merge them without ever being multiplied out.

The change that a low-rank adapter makes to a weight is `b a`. Sums of such products are products again: the halves side
by side. Their singular vectors come from those of a small core, because with b = Q R and a^T = P L

    b a = Q (R L^T) P^T

so that R L^T, as small as the ranks, has all that matters. What several products write lies in the span of their b
together, what they read in that of their a: in orthonormal bases Q, P of these spaces each of them is a small core
Q^T b_t a_t P, and whatever only turns along when inputs and outputs are turned can be done to the cores instead.

Of a matrix that is no product the leading triplets are found by block Lanczos on its Gram matrix: a few passes over
its rows, which may be made anew each time, so that it need not exist as a whole.

Everything is computed, and returned, in float64.

Legend: m rows and n columns of a weight, r columns of one b, R directions of all together.

Reference: Panariello et al., Accurate and efficient low-rank model merging in core space, NeurIPS 2025,
https://arxiv.org/abs/2509.17786 (cores); Golub and Underwood, The block Lanczos method, 1977.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergetool.kernels.rng import normal, stream_key
from mergetool.kernels.spectral import Factors, truncated_svd, with_signs

Keep = int | float | None
"""How much of a matrix is kept: so many directions, as many as hold a share of the squared norm, or all that count."""

_ROUNDING = torch.finfo(torch.float64).eps
_BESIDE = 8
"""Directions that a search for leading ones carries beside those asked for: it converges in fewer passes."""
_BLOCK = 64
"""Directions that it adds in a pass where nobody says how many are asked for."""
_SETTLED = 3e-5
"""A search ends once a pass finds less than this share of what is left out."""
_PASSES = 30
_DEPENDENT = 1e-13
"""What a pass finds below this share of the squared norm is rounding."""
_SLICE = 1 << 21
"""Entries of a matrix that are looked at together."""
_SMALL = 1024
"""Smaller dimension up to which the whole Gram matrix is no dearer than a search."""


class Pair(NamedTuple):
    """The matrix b a (m, n)."""

    b: Tensor
    """(m, r)."""
    a: Tensor
    """(r, n)."""

    def dense(self) -> Tensor:
        """The matrix itself, in float64."""
        return _exact(self.b) @ _exact(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.b.shape[0], self.a.shape[1]


class _Reflections(NamedTuple):
    """x = Q R with Q as LAPACK leaves it: a few of its combinations cost less than its columns."""

    reflectors: Tensor
    scales: Tensor
    small: Tensor
    """R, (min(m, k), k)."""

    @classmethod
    def of(cls, x: Tensor) -> "_Reflections":
        reflectors, scales = torch.geqrf(x)
        return cls(reflectors, scales, reflectors[: min(x.shape)].triu())

    def turn(self, x: Tensor) -> Tensor:
        """Q x."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, len(self.reflectors) - len(x)))
        turned: Tensor = torch.ormqr(self.reflectors[:, : len(self.scales)], self.scales, padded)
        return turned


class Basis(NamedTuple):
    """Orthonormal columns (m, R), not all of which need be made."""

    reflections: _Reflections
    turned: Tensor

    def times(self, x: Tensor) -> Tensor:
        """The basis times x (R, k)."""
        return self.reflections.turn(self.turned @ x)


class Cores(NamedTuple):
    """Matrices `outputs core inputs^T`; a side without a basis is not turned."""

    outputs: Basis | None
    inputs: Basis | None
    cores: list[Tensor]


# Pairs


def concatenated(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The sum of weight * b a, exactly: halves side by side. Products of weight 0 are left out."""
    kept = [(pair, weight) for pair, weight in zip(pairs, weights, strict=True) if weight]
    halves = [(_exact(pair.b) * weight, _exact(pair.a)) for pair, weight in kept] or [_nothing(pairs[0])]
    return Pair(torch.cat([b for b, _ in halves], 1), torch.cat([a for _, a in halves]))


def summed_halves(pairs: Sequence[Pair], weights: Sequence[tuple[float, float]]) -> Pair:
    """The sum of weighted b, times the sum of weighted a: not the sum of the products, but as thin as each of them.

    Pairs of rank 0 have no part in it. Raises ValueError where the others differ in rank.
    """
    parts = [(pair, on) for pair, on in zip(pairs, weights, strict=True) if pair.b.shape[1]]
    ranks = [pair.b.shape[1] for pair, _ in parts]
    if len(set(ranks)) > 1:
        raise ValueError(f"thin matrices of the ranks {ranks} cannot be added up by themselves")
    total = _nothing(pairs[0]) if not parts else Pair(*(0.0 * _exact(half) for half in parts[0][0]))
    for pair, (on_b, on_a) in parts:
        total = Pair(total.b + on_b * _exact(pair.b), total.a + on_a * _exact(pair.a))
    return total


def _nothing(like: Pair) -> Pair:
    m, n = like.shape
    return Pair(_exact(like.b).new_zeros(m, 0), _exact(like.a).new_zeros(0, n))


def triplets(pair: Pair) -> Factors:
    """The singular triplets of b a, at most r of them, without those that are rounding."""
    return _triplets(pair, None)[0]


def truncated(pair: Pair, keep: Keep) -> tuple[Pair, float]:
    """The best approximation of b a that `keep` allows, and what it loses (Frobenius norm, relative).

    Directions that are rounding are never kept. The square roots of singular values are on both halves.
    """
    kept, lost = _triplets(pair, keep)
    return balanced(kept), lost


def _triplets(pair: Pair, keep: Keep) -> tuple[Factors, float]:
    if not pair.b.any() or not pair.a.any():
        nothing = _nothing(pair)
        return Factors(nothing.b, nothing.b.new_ones(0), nothing.a.mT), 0.0
    left, right = _Reflections.of(_exact(pair.b)), _Reflections.of(_exact(pair.a).mT)
    u, s, vh = torch.linalg.svd(left.small @ right.small.mT, full_matrices=False)
    # What is rounding is told from the parts of the sum, which may cancel, not from the sum.
    parts = float(torch.linalg.vector_norm(left.small, dim=0) @ torch.linalg.vector_norm(right.small, dim=0))
    s = s[s > max(pair.shape) * _ROUNDING * parts]
    count = _count(s, float(s.square().sum()), keep)
    return with_signs(Factors(left.turn(u[:, :count]), s[:count], right.turn(vh[:count].mT))), _share(s, count)


def _share(s: Tensor, count: int) -> float:
    """What is lost with all but the first `count` of these singular values."""
    energy = s.square()
    return float(energy[count:].sum() / energy.sum()) ** 0.5 if count < len(s) else 0.0


def _count(s: Tensor, energy: float, keep: Keep) -> int:
    """How many of these singular values, descending, are kept of a matrix with this squared norm."""
    if isinstance(keep, float):
        return min(int((s.square().cumsum(0) < energy * keep * (1 - 1e-12)).sum()) + 1, len(s))
    return len(s) if keep is None else min(keep, len(s))


def balanced(factors: Factors) -> Pair:
    """Factors as a pair, the square roots of singular values on both halves."""
    root = factors.s.sqrt()
    return Pair(factors.u * root, (factors.v * root).mT)


def in_cores(pairs: Sequence[Pair], *, outputs: bool = True, inputs: bool = True) -> Cores:
    """The same matrices in orthonormal bases of all that they write and read, exactly."""
    writing, reading = [_exact(pair.b) for pair in pairs], [_exact(pair.a).mT for pair in pairs]
    left, writing = _in_basis(writing) if outputs else (None, writing)
    right, reading = _in_basis(reading) if inputs else (None, reading)
    return Cores(left, right, [b @ a.mT for b, a in zip(writing, reading, strict=True)])


def _in_basis(parts: "list[Tensor]") -> "tuple[Basis, list[Tensor]]":
    """A basis of what the columns of all parts span, and the parts in it (R, r)."""
    every = _Reflections.of(torch.cat(parts, 1))
    u, s, _ = torch.linalg.svd(every.small, full_matrices=False)
    u = u[:, s > s.max() * max(every.reflectors.shape) * _ROUNDING] if len(s) else u
    return Basis(every, u), list((u.mT @ every.small).split([part.shape[1] for part in parts], 1))


def lifted(cores: Cores, core: Tensor, keep: Keep) -> tuple[Pair, float]:
    """The best approximation that `keep` allows of the matrix that a core stands for, and what it loses."""
    core = _exact(core)
    one = torch.eye(min(core.shape), dtype=core.dtype, device=core.device)
    pair, lost = truncated(Pair(core, one) if core.shape[1] <= core.shape[0] else Pair(one, core), keep)
    b = pair.b if cores.outputs is None else cores.outputs.times(pair.b)
    a = pair.a.mT if cores.inputs is None else cores.inputs.times(pair.a.mT)
    turned = with_signs(Factors(b, b.new_ones(b.shape[1]), a))
    return Pair(turned.u, turned.v.mT), lost


# Matrices that are no products


def leading(matrix: Tensor, keep: Keep) -> tuple[Pair, float]:
    """The best approximation of a matrix that `keep` allows, and what it loses, as `truncated` says it of a pair."""
    if not isinstance(keep, int) or min(matrix.shape) <= _SMALL:
        return _cut_of(matrix, keep)
    if matrix.shape[0] < matrix.shape[1]:
        turned, lost = leading(matrix.mT, keep)
        return Pair(turned.a.mT, turned.b.mT), lost
    return leading_of_rows(lambda start, stop: matrix[start:stop], matrix.shape, keep, device=matrix.device)


def _cut_of(matrix: Tensor, keep: Keep) -> tuple[Pair, float]:
    """`leading` from the whole Gram matrix of the smaller side."""
    exact, size = _exact(matrix), min(matrix.shape)
    if not exact.any():
        return Pair(exact[:, :0], exact[:0]), 0.0
    factors = truncated_svd(exact, min(keep, size) if isinstance(keep, int) else size)
    factors = factors.live(max(matrix.shape) * _ROUNDING)
    if not isinstance(keep, int):
        count = _count(factors.s, float(factors.s.square().sum()), keep)
        return balanced(factors.leading(count)), _share(factors.s, count)
    return balanced(factors), float(torch.linalg.vector_norm(exact - factors.dense()) / torch.linalg.vector_norm(exact))


def leading_of_rows(
    read: Callable[[int, int], Tensor],
    shape: Sequence[int],
    keep: Keep,
    *,
    rows: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Pair, float]:
    """`leading` of a matrix of which `read(start, stop)` gives rows, on `device`: asked for all of them several times.

    Raises ValueError for a matrix that is not finite.
    """
    m, n = shape
    matrix = _Rows(read, m, n, rows or max(1, _SLICE // n), device)
    space = _search(matrix, keep)
    written, left_out, energy = matrix.within(space)
    if not space.shape[1] or not energy:
        return Pair(space.new_zeros(m, 0), space.new_zeros(0, n)), 0.0
    left, small = torch.linalg.qr(written)
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    every = with_signs(Factors(left @ u, s, space @ vh.mT)).live(max(m, n) * _ROUNDING)
    kept = every.leading(_count(every.s, energy, keep))
    lost = left_out + float(every.s[kept.rank :].square().sum())
    return balanced(kept), (lost / energy) ** 0.5


class _Rows(NamedTuple):
    """A matrix (m, n) that is seen by blocks of rows only."""

    read: Callable[[int, int], Tensor]
    m: int
    n: int
    rows: int
    device: torch.device | str

    def blocks(self) -> "list[tuple[int, int]]":
        return [(start, min(start + self.rows, self.m)) for start in range(0, self.m, self.rows)]

    def gram_times(self, x: Tensor) -> tuple[Tensor, float]:
        """D^T D x for x (n, k), and the squared norm of D."""
        total, energy = torch.zeros_like(x), 0.0
        for start, stop in self.blocks():
            block = _exact(self.read(start, stop))
            total.addmm_(block.mT, block @ x)
            energy += float(torch.linalg.vector_norm(block)) ** 2
        if not energy < float("inf"):
            raise ValueError("the matrix holds infinities or not-a-numbers")
        return total, energy

    def within(self, x: Tensor) -> tuple[Tensor, float, float]:
        """D x for orthonormal x (n, k); the squared norms of D outside their span, and of D."""
        written, outside, energy = x.new_empty(self.m, x.shape[1]), 0.0, 0.0
        for start, stop in self.blocks():
            block = _exact(self.read(start, stop))
            energy += float(torch.linalg.vector_norm(block)) ** 2
            torch.mm(block, x, out=written[start:stop])
            outside += float(torch.linalg.vector_norm(block - written[start:stop] @ x.mT)) ** 2
        return written, outside, energy


def _search(matrix: _Rows, keep: Keep) -> Tensor:
    """Orthonormal columns (n, k) near the leading right singular vectors, as many as are kept.

    Block Lanczos with full orthogonalisation: all that was found is kept, so that a pass gains more than the last.
    """
    width = min(matrix.n, matrix.m, keep + _BESIDE if isinstance(keep, int) else _BLOCK)
    like = torch.empty(matrix.n, width, dtype=torch.float64, device=matrix.device)
    new = _orthonormal(normal(stream_key(0, "leading directions"), 0, like))
    basis, projected, held = new[:, :0], new.new_zeros(0, 0), -1.0
    for _ in range(_PASSES):
        image, energy = matrix.gram_times(new)
        basis = torch.cat([basis, new], 1)
        projected = _bordered(projected, basis.mT @ image)
        before, held = held, _held(projected, energy, keep)
        if held - before <= _SETTLED * max(energy - held, _ROUNDING * energy) and _is_enough(held, energy, keep):
            break
        new = _beyond(image, basis, energy)
        if not new.shape[1]:
            break
    vectors: Tensor = torch.linalg.eigh(projected)[1].flip(1)
    return basis @ (vectors[:, :keep] if isinstance(keep, int) else vectors)


def _held(projected: Tensor, energy: float, keep: Keep) -> float:
    """The squared norm that the best directions hold, as many as are kept, of those found so far."""
    values = torch.linalg.eigvalsh(projected).flip(0).clamp_(min=0)
    return float(values[: _count(values.sqrt(), energy, keep)].sum())


def _is_enough(held: float, energy: float, keep: Keep) -> bool:
    return isinstance(keep, int) or held >= energy * (1.0 if keep is None else keep) * (1 - 1e-12)


def _bordered(projected: Tensor, columns: Tensor) -> Tensor:
    """A symmetric matrix grown by its last columns."""
    old, size = projected.shape[0], columns.shape[0]
    grown = columns.new_zeros(size, size)
    grown[:old, :old] = projected
    grown[:, old:] = columns
    grown[old:] = columns.mT
    return (grown + grown.mT) / 2


def _beyond(image: Tensor, basis: Tensor, energy: float) -> Tensor:
    """Orthonormal columns for what of `image` lies outside the span of `basis`, without rounding."""
    rest = image - basis @ (basis.mT @ image)
    rest -= basis @ (basis.mT @ rest)
    live, small = torch.linalg.qr(rest)
    if not float(small.diagonal().abs().min()) > _DEPENDENT * energy:
        u, s, _ = torch.linalg.svd(small)
        live = live @ u[:, s > _DEPENDENT * energy][:, : basis.shape[0] - basis.shape[1]]
    return _orthonormal(live - basis @ (basis.mT @ live))


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns)[0]
    return q


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.float64)
