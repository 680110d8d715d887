"""Made-up worlds in which everything is known: items, abilities, answers."""

from dataclasses import dataclass

import numpy as np

from mergetool.search.irt import sigmoid


@dataclass
class World:
    """Merges of a few parents, and their answers."""

    discrimination: np.ndarray
    difficulty: np.ndarray
    parents: np.ndarray
    rng: np.random.Generator
    noise: float

    @classmethod
    def make(cls, seed, *, num_items=800, num_dimensions=3, num_parents=3, noise=0.3):
        rng = np.random.default_rng(seed)
        loadings = rng.normal(0.5, 0.6, (num_items, num_dimensions))
        parents = rng.normal(0.5, 1.0, (num_parents, num_dimensions))
        return cls(loadings, rng.normal(0.0, 1.2, num_items), parents, rng, noise)

    def merges(self, count):
        """Abilities of merges: combinations of the parents, and something that is in none of them."""
        weights = self.rng.uniform(0.0, 1.0, (count, len(self.parents)))
        mixed = weights @ self.parents / len(self.parents) * 1.5
        return mixed + self.noise * self.rng.normal(size=mixed.shape)

    def answers(self, abilities):
        chance = sigmoid(abilities @ self.discrimination.T - self.difficulty)
        return (self.rng.random(chance.shape) < chance).astype(float)


def simulated(seed, *, num_models, num_items=200, num_dimensions=1):
    """(discrimination, difficulty, abilities, chances, answers) as a two-parameter model draws them."""
    rng = np.random.default_rng(seed)
    a = (
        rng.lognormal(0.0, 0.4, (num_items, num_dimensions))
        if num_dimensions == 1
        else rng.normal(0.6, 0.8, (num_items, num_dimensions))
    )
    b, theta = rng.normal(0.0, 1.0, num_items), rng.normal(0.0, 1.0, (num_models, num_dimensions))
    chance = sigmoid(theta @ a.T - b)
    return a, b, theta, chance, (rng.random(chance.shape) < chance).astype(float)
