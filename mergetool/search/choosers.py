"""Engines that end by themselves: each point of a grid, or models one by one. Afterwards `ask` gives no more points.

The greedy soup sees every gene at its lowest value as a model left out, and at its highest as one taken whole:
`inner: {method: linear, weight: {search: [0, 1]}}`, one gene a model. It asks every model alone, begins with the best,
and adds, from the better to the worse, each one with which the average scores no less.

Reference: Wortsman et al., Model soups, ICML 2022, https://arxiv.org/abs/2203.05482, recipe 1.
Differs from the paper: nothing.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mergetool.search.space import Point

Scores = NDArray[np.float64]


class Grid:
    """Every point of a grid once, in the order of a counter whose last digit runs fastest."""

    def __init__(self, counts: Sequence[int], population: int) -> None:
        self._left = [
            tuple((digit + 0.5) / count for digit, count in zip(digits, counts, strict=True))
            for digits in product(*map(range, counts))
        ]
        self._population = population

    def ask(self) -> list[Point]:
        taken, self._left = self._left[: self._population], self._left[self._population :]
        return taken

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        pass


class Greedy:
    """The greedy soup."""

    def __init__(self, num_genes: int) -> None:
        self._alone = [_taken({gene}, num_genes) for gene in range(num_genes)]
        self._num_genes = num_genes
        self._waiting: list[int] | None = None
        self._soup: set[int] = set()
        self._reached = -np.inf

    def ask(self) -> list[Point]:
        if self._waiting is None:
            return self._alone
        return [_taken({*self._soup, self._waiting[0]}, self._num_genes)] if self._waiting else []

    def tell(self, points: Sequence[Point], scores: Scores) -> None:
        reached = scores.mean(axis=1)
        if self._waiting is None:
            best, *self._waiting = (int(gene) for gene in np.argsort(-reached, kind="stable"))
            self._soup, self._reached = {best}, reached[best]
            return
        tried = self._waiting.pop(0)
        if reached[0] >= self._reached:
            self._soup.add(tried)
            self._reached = reached[0]


def _taken(genes: set[int], num_genes: int) -> Point:
    return tuple(float(gene in genes) for gene in range(num_genes))
