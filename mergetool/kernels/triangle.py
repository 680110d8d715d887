"""Sums of `x^T x` of which each pair of columns is held once: square tiles on and above the diagonal, float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1024
"""Columns of a tile."""


def numbers_of(width: int) -> int:
    """How many numbers the sum of so many columns holds."""
    sides = [min(TILE, width - start) for start in range(0, width, TILE)]
    return sum(side * sum(sides[place:]) for place, side in enumerate(sides))


class SymmetricSum:
    """A sum of `x^T x` for matrices x (rows, width)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        """Rows that were added."""
        self._starts = range(0, width, TILE)
        self._tiles: dict[tuple[int, int], Tensor] = {}

    def add(self, x: Tensor) -> None:
        """Multiply in the dtype of x, add up in float64."""
        self.count += len(x)
        for i in self._starts:
            for j in self._starts[i // TILE :]:
                product = x[:, i : i + TILE].T @ x[:, j : j + TILE]
                known = self._tiles.get((i, j))
                self._tiles[i, j] = product.to(torch.float64) if known is None else known.add_(product)

    def copy(self) -> "SymmetricSum":
        """Another one, so far the same."""
        other = SymmetricSum(0)
        other.count, other._starts = self.count, self._starts
        other._tiles = {at: tile.clone() for at, tile in self._tiles.items()}
        return other

    def means(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The whole matrix over the number of rows, some rows of it after the other. It is good for this once."""
        for tile in self._tiles.values():
            tile.div_(self.count)
        for i in self._starts:
            left = [self._tiles[j, i].T.to(dtype) for j in self._starts[: i // TILE]]
            yield torch.cat([*left, *(self._tiles[i, j].to(dtype) for j in self._starts[i // TILE :])], 1)
