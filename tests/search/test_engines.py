"""Optimisers on landscapes whose best place is known."""

import random

import numpy as np
import pytest

from mergetool.search.engines import make_engine, sobol_points
from mergetool.search.pareto import front
from mergetool.search.space import Gene, SearchSpace

ALGORITHMS = ("random", "sobol", "cma-es", "ga", "nsga2", "tpe")
BEST = np.array([0.7, 0.2, 0.55])


def hill(points):
    """A planted quadratic: 1 at `BEST`."""
    return 1.0 - ((np.array(points) - BEST) ** 2).sum(axis=1, keepdims=True)


def run(algorithm, landscape=hill, *, seed=0, budget=200, population=20, genes=3, snap=tuple, seeds=()):
    """All points asked for and their scores."""
    engine = make_engine(algorithm, genes, population, seeds=list(seeds), seed=seed, snap=snap)
    points, scores = [], []
    while len(points) < budget:
        asked = engine.ask()
        told = landscape(asked)
        engine.tell(asked, told)
        points += asked
        scores += list(told)
    return points, np.array(scores)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_optimum_is_found_within_5_percent_in_200_evaluations(algorithm):
    assert run(algorithm)[1].max() >= 0.95


@pytest.mark.parametrize("algorithm", ["cma-es", "ga", "tpe"])
def test_an_optimiser_is_better_than_chance(algorithm):
    def median(name):
        return np.median([run(name, seed=seed)[1].max() for seed in range(5)])

    assert median(algorithm) > median("random")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_seed_settles_everything_and_global_generators_are_left_alone(algorithm):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    first = run(algorithm, budget=60)[0]
    assert states() == before
    np.random.seed(5)
    assert run(algorithm, budget=60)[0] == first
    assert run(algorithm, budget=60, seed=1)[0][:20] != first[:20]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_points_stay_in_the_cube_and_seeds_come_first(algorithm):
    seeds = [(0.1, 0.2, 0.3), (0.9, 0.9, 0.9)]
    points, _ = run(algorithm, seeds=seeds)
    assert np.array(points).min() >= 0.0
    assert np.array(points).max() <= 1.0
    if algorithm == "cma-es":
        assert np.abs(np.mean(points[:20], axis=0) - seeds[0]).max() < 0.25
    else:
        assert points[:2] == seeds


@pytest.mark.parametrize("algorithm", ["ga", "nsga2"])
def test_values_stay_on_their_grid_in_all_generations_and_no_generation_asks_twice(algorithm):
    space = SearchSpace(tuple(Gene(name, 0.0, 1.0, step=0.1) for name in "xyz"))
    points, _ = run(algorithm, snap=space.snap, budget=100)
    assert all(space.snap(point) == point for point in points)
    for start in range(0, 100, 20):
        assert len(set(points[start : start + 20])) == 20


def two_hills(points):
    """Like ZDT1: the front is where the second and third gene are 0."""
    x = np.array(points)
    g = 1.0 + 4.5 * x[:, 1:].sum(axis=1)
    return np.stack([1.0 - x[:, 0], 1.0 - g * (1.0 - np.sqrt(x[:, 0] / g))], axis=1)


def hypervolume(scores, worst):
    """Area (two objectives) between the point `worst` and what the rows dominate; higher is better."""
    points = scores[front(scores)]
    points = points[(points > worst).all(axis=1)]
    area, height = 0.0, float(worst[1])
    for first, second in points[np.argsort(-points[:, 0])]:
        if second > height:
            area += float((first - worst[0]) * (second - height))
            height = float(second)
    return area


def test_a_front_is_found_and_nothing_in_it_is_dominated():
    _, scores = run("nsga2", two_hills, budget=1500, population=30)
    found = front(scores)
    for place in found:
        others = np.delete(scores, place, axis=0)
        assert not ((others >= scores[place]).all(axis=1) & (others > scores[place]).any(axis=1)).any()
    share = np.linspace(0, 1, 2001)
    exact = np.stack([1.0 - share, np.sqrt(share)], axis=1)
    reference = np.array([-0.1, -0.1])
    assert hypervolume(scores, reference) >= 0.95 * hypervolume(exact, reference)


def test_of_equal_rows_a_front_holds_one():
    scores = np.array([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0]])
    assert front(scores) == [1, 0, 4]
    assert hypervolume(scores, np.array([0.0, 0.0])) == pytest.approx(0.25)


def test_sobol_points_fill_the_cube_more_evenly_than_chance():
    points = np.array(sobol_points(16, 2, 0))
    assert {tuple(cell) for cell in np.floor(points * 4).astype(int)} == {(i, j) for i in range(4) for j in range(4)}
    assert sobol_points(0, 2, 0) == []


def to_the_end(algorithm, worth, **options):
    """Everything that an engine which ends by itself asks, generation by generation."""
    engine = make_engine(algorithm, 3, 4, seeds=[], seed=0, snap=tuple, **options)
    asked = []
    while points := engine.ask():
        asked.append(points)
        engine.tell(points, np.array([[worth(point)] for point in points]))
    return asked


def test_a_grid_asks_every_point_once():
    asked = to_the_end("grid", sum, counts=(2, 1, 3))
    assert [len(points) for points in asked] == [4, 2]
    assert {point for points in asked for point in points} == {
        (x, 0.5, z) for x in (0.25, 0.75) for z in (1 / 6, 0.5, 5 / 6)
    }


@pytest.mark.parametrize(
    ("together", "soup"), [(0.9, (0, 1, 1)), (0.8, (0, 1, 1)), (0.7, (0, 1, 0))], ids=["more", "no less", "less"]
)
def test_a_greedy_soup_takes_models_from_the_better_to_the_worse_where_that_does_no_harm(together, soup):
    worth = {(1, 0, 0): 0.5, (0, 1, 0): 0.8, (0, 0, 1): 0.6, (0, 1, 1): together}
    alone, second, third = to_the_end("greedy", lambda point: worth.get(point, 0.1))
    assert alone == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert second == [(0, 1, 1)]
    assert third == [(1, *soup[1:])]
