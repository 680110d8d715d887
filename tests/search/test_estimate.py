"""How near estimates from few items come, in worlds where the truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from mergetool.search import subset
from mergetool.search.estimate import Estimator, blend_of, cross_check, rank_correlation, with_fit
from mergetool.search.irt import fit, sigmoid
from tests.files import LONG
from tests.search.worlds import World, simulated

KINDS = ("mean", "weighted", "p-irt", "mp-irt", "gp-irt", "gmp-irt")


def made(kind, chosen, answers, **more):
    """An estimator fitted to answers whose first three rows are the parents, and the fourth the base."""
    estimator = Estimator(kind, chosen, answers.shape[1], **more)
    return with_fit(estimator, fit(answers, 1), [0, 1, 2], 3)


def calibrated(world, count=24):
    base = np.full((1, world.parents.shape[1]), -0.5)
    return world.answers(np.vstack([world.parents, base, world.merges(count - 4)]))


@pytest.mark.parametrize("kind", KINDS)
def test_all_items_asked_is_the_score_itself(kind):
    world = World.make(0, num_items=60)
    answers = calibrated(world)
    (asked,) = world.answers(world.merges(1))
    found = made(kind, subset.equal(list(range(60))), answers)(asked)
    assert found.value == pytest.approx(asked.mean(), abs=1e-12)
    assert found.error == 0.0


@pytest.mark.parametrize("span", ["linear", "affine"])
def test_in_one_dimension_a_span_confines_nothing(span):
    world = World.make(1, num_items=200)
    answers = calibrated(world)
    chosen = subset.equal(list(range(0, 200, 2)))
    (asked,) = world.answers(world.merges(1))
    values = [made(kind, chosen, answers, span=span)(asked[chosen.items]).value for kind in ("p-irt", "mp-irt")]
    assert values[0] == pytest.approx(values[1], abs=5e-3)


def errors(seeds, size, noise):
    """Mean absolute error and rank correlation of estimators over merges of several worlds."""
    found = {name: [] for name in ("random", "weighted", "gmp-irt")}
    for seed in seeds:
        world = World.make(seed, num_items=400, noise=noise)
        answers = calibrated(world)
        tried = world.answers(world.merges(60))
        truth = tried.mean(axis=1)
        rng = np.random.default_rng(seed)
        chosen = subset.stratified(answers, size, rng)
        check = cross_check(
            Estimator("gmp-irt", chosen, 400), answers, parents=[0, 1, 2], base=3, num_dimensions=1, rng=rng
        )
        makers = {
            "random": Estimator("mean", subset.random(400, size, rng), 400),
            "weighted": Estimator("weighted", chosen, 400),
            "gmp-irt": replace(made("gmp-irt", chosen, answers), blend=check.blend),
        }
        for name, maker in makers.items():
            values = np.array([maker(row[maker.subset.items]).value for row in tried])
            found[name].append((np.abs(values - truth).mean(), rank_correlation(values, truth)))
    return {name: np.mean(pairs, axis=0) for name, pairs in found.items()}


@pytest.mark.parametrize(("size", "share"), [(20, 0.70), (50, 0.90)] if LONG else [(20, 0.70)])
def test_the_blend_is_nearer_than_a_mean_of_random_items_and_ranks_as_well(size, share):
    found = errors(range(4), size, noise=0.3)
    assert found["gmp-irt"][0] <= share * found["random"][0]
    assert found["gmp-irt"][1] >= found["weighted"][1] - 0.05


def test_the_blend_does_no_harm_where_merges_are_unlike_their_parents():
    found = errors(range(3), 50, noise=0.8)
    assert found["gmp-irt"][0] <= 1.05 * found["random"][0]


@pytest.mark.parametrize("kind", ["p-irt", "mp-irt", "gmp-irt"])
def test_a_collapsed_merge_is_seen_to_be_one(kind):
    _, _, _, _, answers = simulated(0, num_models=24, num_items=400)
    chosen = subset.stratified(answers, 50, np.random.default_rng(0))
    collapsed = (np.random.default_rng(1).random(400) < 0.02).astype(float)
    assert made(kind, chosen, answers)(collapsed[chosen.items]).value < 0.15


def test_the_error_that_is_told_is_about_the_error_that_is_made():
    world = World.make(0)
    answers = calibrated(world, 100)
    chosen = subset.stratified(answers, 30, np.random.default_rng(0))
    tried = world.answers(world.merges(100))
    for kind in ("mean", "p-irt"):
        estimator = made(kind, chosen, answers)
        found = [estimator(row[chosen.items]) for row in tried]
        missed = np.array([e.value - row.mean() for e, row in zip(found, tried, strict=True)])
        told = np.sqrt(np.mean([e.error**2 for e in found]))
        assert 0.5 * told < np.sqrt((missed**2).mean()) < 2.0 * told, kind


def test_the_blend_leans_to_whichever_errs_less():
    rng = np.random.default_rng(0)
    small, large = 0.01 * rng.normal(size=200), 0.2 * rng.normal(size=200)
    assert blend_of(small, large) > 0.9
    assert blend_of(large, small) < 0.1
    assert 0.3 < blend_of(small[:3], large[:3]) < 0.9
    assert blend_of(small, small) == 0.5


def test_item_response_theory_is_dropped_where_it_knows_nothing():
    rng = np.random.default_rng(0)
    coins = (rng.random((24, 200)) < 0.5).astype(float)
    chosen = subset.stratified(coins, 100, rng)
    known = {"parents": [0, 1, 2], "base": 3, "num_dimensions": 1, "rng": rng}
    noise = cross_check(Estimator("gmp-irt", chosen, 200), coins, **known)
    assert noise.kind in ("gmp-irt", "weighted")
    strong = np.linspace(-3, 3, 24)[rng.permutation(24), None]
    chance = sigmoid(1.5 * strong - rng.normal(0, 2, 200))
    answers = (rng.random(chance.shape) < chance).astype(float)
    few = subset.random(200, 10, rng)
    assert cross_check(Estimator("gmp-irt", few, 200), answers, **known).kind == "gmp-irt"
    assert cross_check(Estimator("mean", few, 200), answers, **known).kind == "mean"
