"""Which few items stand for all: drawn at random, one from each block of like difficulty, or the centres of clusters.

A subset is item places in ascending order with weights that add up to 1. Clusters want many models to tell items apart
(with fewer than `FEWEST_FOR_CLUSTERS` they do worse than chance); blocks of like difficulty never do harm.

Reference: Polo et al., tinyBenchmarks, ICML 2024, https://arxiv.org/abs/2402.14992, section 3.1 (anchor points).
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from mergetool.search.irt import Floats, ItemBank

FEWEST_FOR_CLUSTERS = 30


@dataclass(frozen=True)
class Subset:
    """Places of items, ascending and unique, and their weights."""

    items: NDArray[np.intp]
    weights: Floats


def equal(items: "NDArray[np.intp] | list[int]") -> Subset:
    """A given list of places, all of one weight."""
    places = np.unique(np.asarray(items, dtype=np.intp))
    return Subset(places, np.full(len(places), 1.0 / len(places)))


def random(num_items: int, size: int, rng: np.random.Generator) -> Subset:
    """Drawn without replacement."""
    return equal(rng.choice(num_items, size=min(size, num_items), replace=False))


def stratified(answers: Floats, size: int, rng: np.random.Generator) -> Subset:
    """One item from each of `size` blocks of like difficulty, by how many of the models (M, N) answered rightly."""
    num_items = answers.shape[1]
    difficulty = np.nanmean(answers, axis=0) if len(answers) else np.zeros(num_items)
    order = np.lexsort((rng.permutation(num_items), difficulty))
    blocks = np.array_split(order, min(size, num_items))
    drawn = np.array([int(rng.choice(block)) for block in blocks], dtype=np.intp)
    weights = np.array([len(block) / num_items for block in blocks])
    places = np.argsort(drawn)
    return Subset(drawn[places], weights[places])


def by_irt(items: ItemBank, size: int, rng: np.random.Generator) -> Subset:
    """Items nearest to the centres of clusters of (discrimination, difficulty), weighted by cluster size."""
    return _anchors(np.hstack([items.discrimination, items.difficulty[:, None]]), size, rng)


def by_correctness(answers: Floats, size: int, rng: np.random.Generator) -> Subset:
    """Items nearest to the centres of clusters of answers: items that the same models (M, N) get right."""
    centre = np.nanmean(answers, axis=0)
    return _anchors(np.where(np.isnan(answers), centre, answers).T, size, rng)


def _anchors(features: Floats, size: int, rng: np.random.Generator) -> Subset:
    """k-means on rows; coinciding anchors are one, with the weight of all."""
    num_items = len(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clusters that run empty: they are left out
        centres, label = kmeans2(features, min(size, num_items), minit="++", rng=rng)
    weight: dict[int, float] = {}
    for cluster in np.unique(label):
        distance = ((features - centres[cluster]) ** 2).sum(axis=1)
        anchor = int(np.argmin(np.where(label == cluster, distance, np.inf)))
        weight[anchor] = weight.get(anchor, 0.0) + float((label == cluster).sum()) / num_items
    places = np.array(sorted(weight), dtype=np.intp)
    return Subset(places, np.array([weight[int(place)] for place in places]))
