import numpy as np
import pytest

from mergetool.search import subset
from mergetool.search.irt import fit
from tests.search.worlds import World


@pytest.fixture(scope="module")
def answers():
    world = World.make(0, num_items=300)
    return world.answers(world.merges(40))


def every(answers, size, rng):
    return {
        "random": subset.random(answers.shape[1], size, rng),
        "stratified": subset.stratified(answers, size, rng),
        "irt": subset.by_irt(fit(answers, 1).items, size, rng),
        "correctness": subset.by_correctness(answers, size, rng),
        "list": subset.equal(list(range(size))[::-1]),
    }


@pytest.mark.parametrize("size", [1, 20, 299, 300])
def test_places_ascend_and_weights_add_up_to_1(answers, size):
    for name, found in every(answers, size, np.random.default_rng(0)).items():
        assert list(found.items) == sorted(set(found.items)), name
        assert found.weights.sum() == pytest.approx(1.0), name
        assert 1 <= len(found.items) <= size, name
        assert found.items[0] >= 0, name
        assert found.items[-1] < 300, name


def test_the_same_generator_draws_the_same_and_another_one_does_not(answers):
    first, again, other = (every(answers, 20, np.random.default_rng(seed)) for seed in (0, 0, 1))
    for name in ("random", "stratified"):
        assert list(first[name].items) == list(again[name].items) != list(other[name].items)


def test_one_item_of_each_difficulty_tells_more_than_a_random_draw(answers):
    world = World.make(0, num_items=300)
    tried = world.answers(world.merges(60))
    rng = np.random.default_rng(0)

    def error(draw):
        return np.mean([np.abs(tried[:, s.items] @ s.weights - tried.mean(axis=1)).mean() for s in draw])

    blocks = error([subset.stratified(answers, 20, rng) for _ in range(50)])
    chance = error([subset.random(300, 20, rng) for _ in range(50)])
    assert blocks < 0.95 * chance


def test_coinciding_anchors_are_one_with_the_weight_of_all():
    same = np.repeat(np.array([[1.0, 0.0], [0.0, 1.0]]), [30, 10], axis=1)[:, :40]
    found = subset.by_correctness(same, 10, np.random.default_rng(0))
    assert len(found.items) == len(set(found.items)) <= 10
    assert found.weights.sum() == pytest.approx(1.0)
    assert found.weights[found.items < 30].sum() == pytest.approx(0.75)
