"""Leading directions of many matrices at once, by products instead of decompositions: what a GPU is fast at.

Merging by singular vectors wants the k leading eigenvectors of a Gram matrix, a fraction of all. A device that takes a
second for the whole decompositions of eight matrices multiplies them by a block of vectors in milliseconds. So a block
somewhat wider than k is turned towards the leading space: a polynomial of the matrix, small on [0, b] and growing
beyond as fast as any of its degree can (Chebyshev's), makes the block's share in eigenvalues above b grow. Orthonormal
again, the block is rotated to the best eigenvectors within it (Rayleigh-Ritz), which also tells b and what is missing.

What stands far above the rest must not drown it: the degree is limited so that no direction grows by more than rounding
allows. Directions that are found are locked: taken out of the matrix, so that the largest of the others sets the limit,
and the degree rises. That is what finds a cut in flat noise behind strong directions.

It ends when every direction wanted is known to 3e-7: a merge that makes those of several models orthogonal is then
right to 1e-5, as that multiplies errors. What does not get there is left to `eigh`; `searching` tells how
often.

Reference: Zhou and Saad, A Chebyshev-Davidson algorithm for large symmetric eigenproblems, SIMAX 2007 (filters);
Rutishauser, Simultaneous iteration method for symmetric matrices, 1970.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from mergetool.kernels.eigen import checked_eigh
from mergetool.kernels.rng import normal, stream_key

_BESIDE = 0.2
"""Directions carried beside those wanted, as a share of these: the more, the faster, but rotations get dearer."""
_TOLERANCE = 3e-7
"""Error of the space that is good enough, as that of the matrix cut to it, relative to its largest singular value."""
_FOUND = 3e-7
"""Angle to the true direction below which one is locked."""
_GROWTH = 14.0
"""Logarithm of the most that a direction may grow between two times the block is made orthonormal."""
_STEEPEST = 1e-6
"""Eigenvalues below this share of the largest still searched for have to wait until that is locked."""
_MOST_DEGREE = 20
_PASSES = 3
"""Times the block is filtered between two rotations, which take as long as some twenty products."""
_ROUNDS = 10


@dataclass
class Searches:
    """What became of searches for leading directions."""

    tried: int = 0
    """Matrices."""
    failed: int = 0

    @property
    def notes(self) -> list[str]:
        """What is to be said of matrices that took the slow way."""
        told = f"{self.failed} of {self.tried} matrices by eigh: their leading directions were not found by products"
        return [told] if self.failed else []


_searches: ContextVar[Searches | None] = ContextVar("searches", default=None)


@contextmanager
def searching() -> Iterator[Searches]:
    """Count the searches of this thread while inside."""
    counted = Searches()
    before = _searches.set(counted)
    try:
        yield counted
    finally:
        _searches.reset(before)


def _count(found: list[bool]) -> None:
    if (counted := _searches.get()) is not None:
        counted.tried += len(found)
        counted.failed += found.count(False)


def leading_spaces(gram: Tensor, k: int, noise: float) -> tuple[Tensor, list[bool]]:
    """Orthonormal columns (B, n, k) that span the leading eigenvectors of each matrix (B, n, n), and which were found.

    The matrices are symmetric, without negative eigenvalues, float64. Eigenvalues below noise^2 of the largest may be
    any: what lies there is not looked for. Where a matrix is too hard, its columns are not to be used.
    """
    spaces = torch.eye(gram.shape[-1], k, dtype=gram.dtype, device=gram.device).repeat(len(gram), 1, 1)
    left = torch.linalg.matrix_norm(gram).cpu().nonzero().flatten().tolist()
    if left:
        search = _Search(gram if len(left) == len(gram) else gram[left], k, noise)
        try:
            search.warm_up()
            for _ in range(_ROUNDS):
                found = search.rotate()
                for index, space in zip(compress(left, found), search.spaces(found), strict=True):
                    spaces[index] = space
                left = [index for index, right in zip(left, found, strict=True) if not right]
                if not left:
                    break
                search.drop(found)
                search.lock()
                search.filter()
        except _DependentError:
            pass
    right = [index not in left for index in range(len(gram))]
    _count(right)
    return spaces, right


class _DependentError(Exception):
    """A block lost directions to rounding."""


class _Search:
    """The block of each matrix: locked directions first, then active ones."""

    def __init__(self, gram: Tensor, k: int, noise: float) -> None:
        count, n, _ = gram.shape
        self._k = k
        self._noise = noise
        self._rest = gram
        """The matrix without its locked directions."""
        width = min(n, k + math.ceil(_BESIDE * k) + 8)
        start = normal(stream_key(0, "leading spaces"), 0, gram.new_empty(n, width))
        self._active = start.expand(count, n, width)
        self._values = gram.new_zeros(count, width)
        """Approximate eigenvalues of active directions, descending once rotated."""
        self._floor = gram.new_zeros(count, 1)
        self._angles = self._values
        self._filtered = self._floor
        """The bound of the last pass."""
        self._locked = gram.new_zeros(count, n, 0)

    @property
    def _wanted(self) -> int:
        """Active directions that are wanted."""
        return self._k - self._locked.shape[-1]

    def spaces(self, chosen: list[bool]) -> Tensor:
        """The wanted directions of these matrices."""
        here = [index for index, is_chosen in enumerate(chosen) if is_chosen]
        return torch.cat([self._locked[here], self._active[here][..., : self._wanted]], -1)

    def drop(self, chosen: list[bool]) -> None:
        """Forget these matrices: what is hard in one must not slow down the others longer than needed."""
        left = [index for index, is_chosen in enumerate(chosen) if not is_chosen]
        if len(left) < len(chosen):
            for name in ("_rest", "_active", "_values", "_floor", "_angles", "_filtered", "_locked"):
                setattr(self, name, getattr(self, name)[left])

    def warm_up(self) -> None:
        """A first block and first bounds without a rotation, from how long columns are before they are orthonormal."""
        shift = _STEEPEST * torch.linalg.matrix_norm(self._rest)[:, None]
        sizes = shift
        for _ in range(2):
            self._active, sizes = _orthonormal(self._rest @ self._active + shift[..., None] * self._active)
        self._values = (sizes - shift).sort(descending=True).values
        for _ in range(2):
            self._pass(self._degree())

    def rotate(self) -> list[bool]:
        """Turn active columns into the best approximations of eigenvectors; says which spaces are good enough."""
        image = self._rest @ self._active
        self._values, turn = checked_eigh(self._active.mT @ image)
        self._values, turn = self._values.flip(-1), turn.flip(-1)
        self._active, image = self._active @ turn, image @ turn
        if not self._locked.shape[-1]:
            self._floor = self._noise**2 * self._values[:, :1]
        outside = image - self._active * self._values[:, None]
        outside -= self._locked @ (self._locked.mT @ outside)
        return self._judge(torch.linalg.vector_norm(outside, dim=-2))

    def _judge(self, residuals: Tensor) -> list[bool]:
        """Angles of active directions to the true ones, and whether the wanted space is good enough.

        An eigenvector is off by its residual over its distance to what is not in the block, at most the last value.
        Two within the block can be mixed up as well, to second order, but over their own distance: that counts at the
        cut.
        """
        values, last = self._values, self._bound()
        distance = (values - last).clamp_(min=1e-3 * last)
        # Of what lies below the bound of the last pass nothing is known, unless that was where noise begins.
        below = torch.where(self._filtered <= self._floor, 0.0, torch.inf)
        self._angles = torch.where(values > self._filtered, residuals / distance, below)
        weights = (values.clamp(min=0) / self._largest()).sqrt()
        errors = torch.linalg.vector_norm((self._angles * weights)[:, : self._wanted], dim=-1)
        inner, outer = self._wanted - 1, min(self._wanted, values.shape[-1] - 1)
        gap = (values[:, inner] - values[:, outer]).clamp_(min=1e-300)
        mixed = self._angles[:, inner] * residuals[:, outer] / gap * weights[:, inner]
        return [error < _TOLERANCE for error in torch.maximum(errors, mixed).tolist()]

    def _largest(self) -> Tensor:
        """The largest eigenvalue of each matrix."""
        return (self._floor / self._noise**2).clamp(min=1e-300)

    def _bound(self) -> Tensor:
        """The eigenvalue up to which directions are not wanted, (B, 1)."""
        return torch.maximum(self._values[:, -1:], torch.maximum(self._floor, _STEEPEST * self._values[:, :1]))

    def lock(self) -> None:
        """Take the first directions out of the matrices: as many as are found in all of them, but one wanted."""
        settled = int((self._angles < _FOUND).long().cumprod(-1).sum(-1).min())
        count = min(settled, self._wanted - 1)
        new, values = self._active[..., :count], self._values[:, None, :count]
        take_out = Tensor.baddbmm_ if self._locked.shape[-1] else torch.baddbmm  # the first time it is another's matrix
        self._rest = take_out(self._rest, new * values, new.mT, alpha=-1)
        self._locked = torch.cat([self._locked, new], -1)
        self._active, self._values = self._active[..., count:], self._values[:, count:]
        self._angles = self._angles[:, count:]

    def filter(self) -> None:
        """As many passes as the worst direction needs, if it shrinks as Chebyshev's polynomials say, and no more."""
        degree = self._degree()
        slowest = _steepness(self._values[:, self._wanted - 1 :][:, :1], self._bound()).clamp(min=1e-2)
        missing = (self._angles[:, : self._wanted].amax(-1, keepdim=True).clamp(1e-300, 1.0) / (0.1 * _FOUND)).log()
        needed = float((missing / slowest).max())
        for _ in range(max(1, min(_PASSES, math.ceil(needed / degree)))):
            self._pass(degree)

    def _degree(self) -> int:
        steepest = float(_steepness(self._values[:, :1], self._bound()).max())
        return max(1, min(_MOST_DEGREE, int(_GROWTH / steepest)))

    def _pass(self, degree: int) -> None:
        """Apply the polynomial to active columns, and make them orthonormal, to locked ones too."""
        self._filtered = self._bound()
        scale = 2 / self._filtered[..., None]
        before, now = self._active, scale * (self._rest @ self._active) - self._active
        for _ in range(degree - 1):
            before, now = now, 2 * (scale * (self._rest @ now) - now) - before
        for _ in range(2 if self._locked.shape[-1] else 1):
            now -= self._locked @ (self._locked.mT @ now)
            now, _ = _orthonormal(now)
        self._active = now


def _steepness(values: Tensor, bound: Tensor) -> Tensor:
    """The logarithm by which a filter of [0, bound] lets directions of these eigenvalues grow for each degree."""
    return (2 * values / bound - 1).clamp(min=1 + 1e-9).acosh()


def _orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the columns, and how much each adds to those before. Raises _DependentError."""
    sizes = torch.ones_like(x[:, 0])
    for _ in range(2):  # the first is off by rounding times the square of the condition
        r, failed = torch.linalg.cholesky_ex(x.mT @ x, upper=True)
        if int(failed.max()):
            raise _DependentError
        x = torch.linalg.solve_triangular(r, x, upper=True, left=False)
        sizes = sizes * r.diagonal(dim1=-2, dim2=-1)
    return x, sizes
