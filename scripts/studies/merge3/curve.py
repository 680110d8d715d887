"""What fewer items cost in searches of 3, 12 and 24 genes: simulated, so that many can be run.

    python -m scripts.studies.merge3.curve [--worlds 8]

A world has three tasks of 2,000 items, half of them for the report. An item is answered rightly where its margin is
positive: `b + s . g - c |g - o|^2`, with how hard it is (b), what each gene does for it (s: much for the items of one
task, little against those of the others) and what leaving the good region costs (c). So genes help some items and hurt
others, and too much of any of them hurts. All that decides a search is mergetool's own: engine, subset, estimator,
re-ranking; only the answers are made up. Scores are on the report items, and lost is what a search finds less than the
one with the same optimiser, the same seed and all items.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mergetool.search import subset
from mergetool.search.engines import make_engine
from mergetool.search.estimate import Estimator, with_fit
from mergetool.search.irt import fit

ITEMS, TASKS, POPULATION, GENERATIONS = 1000, 3, 16, 12
GENES = (3, 12, 24)


@dataclass(frozen=True)
class Asked:
    """How a search asks: items of each task in the subset (0: all), how many are re-ranked, who answers all first."""

    items: int
    rerank: int
    stratified: bool
    algorithm: str = "cma-es"
    others: int = 0
    """Other models whose answers are known."""
    generations: int = GENERATIONS

    def spent(self, known: int, pool: int = ITEMS) -> int:
        """Items answered while searching; `pool` are the search items of each task."""
        if not self.items:
            return POPULATION * self.generations * TASKS * pool
        whole = self.rerank + (known if self.stratified else 0)
        return whole * TASKS * pool + POPULATION * self.generations * TASKS * self.items


ALL = slice(None)
FULL = Asked(0, 0, stratified=False)
WAYS = {
    "all items": FULL,
    "100 of each task": Asked(100, 5, stratified=True),
    "50": Asked(50, 5, stratified=True),
    "20": Asked(20, 5, stratified=True),
    "15, any, two re-ranked": Asked(15, 2, stratified=False),
    "all items, Sobol": Asked(0, 0, stratified=False, algorithm="sobol"),
    "all items, ga": Asked(0, 0, stratified=False, algorithm="ga"),
    "all items, tpe": Asked(0, 0, stratified=False, algorithm="tpe"),
    "20, `gmp-irt` by 32 other models": Asked(20, 5, stratified=True, others=32),
}
PARENTS = 3


class Asks(Protocol):
    """Items of three tasks, and what any candidate of a search answers to them."""

    genes: int
    task: np.ndarray
    """The task of every item."""
    report: np.ndarray
    """Whether an item takes no part in the search."""
    start: tuple[float, ...]
    """Where a search begins."""

    def answers(self, point: tuple[float, ...], places: np.ndarray) -> np.ndarray:
        """1 for each of these items that is answered rightly."""

    def known(self, others: int) -> np.ndarray:
        """Answers of base, parents and others to all items."""


class World:
    """Made-up items, and what any candidate answers to them."""

    def __init__(self, genes: int, seed: int) -> None:
        rng = np.random.default_rng([seed, genes])
        count = 2 * ITEMS * TASKS
        self.task = np.repeat(np.arange(TASKS), 2 * ITEMS)
        own = (np.arange(genes) % TASKS)[None] == self.task[:, None]
        self._slopes = rng.normal(np.where(own, 1.2, -0.4), 1.0, (count, genes)) * 3.0 / np.sqrt(genes)
        self._hard = rng.normal(-0.5, 1.5, count)
        self._cost = np.exp(rng.normal(0.0, 0.4, count)) * 14.0 / genes
        self._middle = rng.uniform(0.0, 1.0, genes)
        self.genes, self.start = genes, (0.5,) * genes
        self.report = np.tile(np.arange(2 * ITEMS) >= ITEMS, TASKS)

    def answers(self, point: tuple[float, ...] | np.ndarray, places: np.ndarray | slice = ALL) -> np.ndarray:
        """1 for each of these items that is answered rightly."""
        place = np.asarray(point)
        away = np.square(place - self._middle).sum()
        return (self._hard + self._slopes @ place - self._cost * away > 0)[places].astype(float)

    def known(self, others: int) -> np.ndarray:
        """Answers of base and parents (no genes, and those of one task), then of other models: any genes."""
        alone = [np.where(np.arange(self.genes) % TASKS == task, 0.5, 0.0) for task in range(TASKS)]
        drawn = np.random.default_rng(others).uniform(-0.2, 1.2, (others, self.genes))
        return np.array([self.answers(np.zeros(self.genes)), *map(self.answers, alone), *map(self.answers, drawn)])


def judge(known: np.ndarray, asked: Asked, rng: np.random.Generator) -> Estimator:
    """How candidates are judged on one task; `known` are the answers of base, parents and others to its items."""
    pool = known.shape[1]
    if not asked.items:
        return Estimator("weighted", subset.equal(list(range(pool))), pool)
    if not asked.stratified:
        return Estimator("weighted", subset.random(pool, asked.items, rng), pool)
    chosen = subset.stratified(known, asked.items, rng)
    if not asked.others:
        return Estimator("weighted", chosen, pool)
    return with_fit(Estimator("gmp-irt", chosen, pool, span="affine"), fit(known, 1), [1, 2, 3], 0)


def search(world: Asks, asked: Asked, seed: int) -> tuple[float, ...]:
    """What one search finds."""
    rng = np.random.default_rng(seed)
    pools = [np.flatnonzero((world.task == task) & ~world.report) for task in range(TASKS)]
    known = world.known(asked.others)
    judges = [judge(known[:, pool], asked, rng) for pool in pools]
    engine = make_engine(asked.algorithm, world.genes, POPULATION, seeds=[world.start], seed=seed, snap=tuple)
    tried: dict[tuple[float, ...], float] = {}
    for _ in range(asked.generations):
        points = engine.ask()
        for point in points:
            tried[point] = _estimated(world, point, pools, judges)
        engine.tell(points, np.array([[tried[point]] for point in points]))
    if not asked.rerank:
        return max(tried, key=lambda point: tried[point])
    best = sorted(tried, key=lambda point: -tried[point])[: asked.rerank]
    return max(best, key=lambda point: world.answers(point, np.concatenate(pools)).mean())


def _estimated(
    world: Asks, point: tuple[float, ...], pools: Sequence[np.ndarray], judges: Sequence[Estimator]
) -> float:
    """The mean over the tasks of what a candidate seems to score, by its answers to the subsets."""
    places = [pool[ask.subset.items] for pool, ask in zip(pools, judges, strict=True)]
    answers = np.split(world.answers(point, np.concatenate(places)), np.cumsum([len(part) for part in places])[:-1])
    return float(np.mean([ask(part).value for ask, part in zip(judges, answers, strict=True)]))


def score(world: World, point: tuple[float, ...]) -> float:
    """On the report items."""
    return float(world.answers(point, world.report).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=8)
    worlds = parser.parse_args().worlds
    print("| genes | asked of a candidate | times fewer | score found | lost against all items |")
    print("|---" * 5 + "|")
    for genes in GENES:
        made = [World(genes, seed) for seed in range(worlds)]
        middle = np.mean([score(world, world.start) for world in made])
        print(f"| {genes} | (the middle of the space) | | {middle:.3f} | |")
        full = np.array([score(world, search(world, FULL, seed)) for seed, world in enumerate(made)])
        for name, asked in WAYS.items():
            found = np.array([score(world, search(world, asked, seed)) for seed, world in enumerate(made)])
            lost, error = (full - found).mean(), (full - found).std(ddof=1) / np.sqrt(worlds)
            fewer = FULL.spent(PARENTS + 1) / asked.spent(PARENTS + 1)
            print(f"| {genes} | {name} | {fewer:.1f} | {found.mean():.3f} | {lost:.3f} ± {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
