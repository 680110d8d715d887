import numpy as np
import pytest
from scipy.optimize import minimize

from mergetool.search.irt import (
    ItemBank,
    abilities,
    choose_dimensions,
    fit,
    from_scalar_difficulty,
    from_vector_difficulty,
    posterior_mode,
    sigmoid,
)
from tests.search.worlds import simulated


def alike(first, second):
    return float(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1])


def off(found, chance):
    """Root mean square error of the fitted chances."""
    return float(np.sqrt(np.nanmean((found.items.probability(found.abilities) - chance) ** 2)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("num_models", "difficulty", "ability", "discrimination", "chances"),
    [(200, 0.97, 0.97, 0.80, 0.07), (50, 0.90, 0.96, 0.55, 0.10)],
)
def test_what_was_simulated_is_found_again(seed, num_models, difficulty, ability, discrimination, chances):
    a, b, theta, chance, answers = simulated(seed, num_models=num_models)
    found = fit(answers, 1)
    assert alike(found.items.difficulty, b) >= difficulty
    assert alike(found.abilities, theta) >= ability
    assert alike(found.items.discrimination, a) >= discrimination
    assert off(found, chance) <= chances


def test_two_dimensions_are_found_up_to_an_affine_map():
    _, _, theta, chance, answers = simulated(0, num_models=300, num_dimensions=2)
    found = fit(answers, 2)
    design = np.hstack([found.abilities, np.ones((300, 1))])
    mapped = design @ np.linalg.lstsq(design, theta, rcond=None)[0]
    assert min(alike(mapped[:, axis], theta[:, axis]) for axis in range(2)) >= 0.94
    assert off(found, chance) <= 0.075


def test_the_order_of_models_and_items_does_not_matter_and_a_fit_is_repeatable():
    _, _, _, _, answers = simulated(1, num_models=60, num_dimensions=2)
    found = fit(answers, 2)
    again = fit(answers.copy(), 2)
    assert found.items.discrimination.tobytes() == again.items.discrimination.tobytes()
    rng = np.random.default_rng(0)
    models, items = rng.permutation(60), rng.permutation(200)
    moved = fit(answers[np.ix_(models, items)], 2)
    chances = found.items.probability(found.abilities)[np.ix_(models, items)]
    assert moved.items.probability(moved.abilities) == pytest.approx(chances, abs=1e-4)


def test_missing_answers_cost_little():
    _, _, _, chance, answers = simulated(2, num_models=200)
    holes = np.random.default_rng(0).random(answers.shape) < 0.2
    assert off(fit(np.where(holes, np.nan, answers), 1), chance) < 1.5 * off(fit(answers, 1), chance)


def test_abilities_have_mean_0_and_covariance_1_and_more_is_better():
    _, _, _, _, answers = simulated(3, num_models=100, num_dimensions=2)
    found = fit(answers, 2)
    assert found.abilities.mean(axis=0) == pytest.approx([0, 0], abs=1e-9)
    assert found.abilities.T @ found.abilities / 100 == pytest.approx(np.eye(2), abs=1e-6)
    assert (found.items.discrimination.sum(axis=0) > 0).all()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("answers", [np.zeros(3), np.ones(3), np.array([1.0]), np.array([0.3, 0.9])])
def test_abilities_are_finite_where_maximum_likelihood_is_not(size, answers):
    rng = np.random.default_rng(0)
    bank = ItemBank(rng.normal(1.0, 2.0, (len(answers), size)), rng.normal(0.0, 3.0, len(answers)))
    (found,), _ = abilities(bank, answers[None])

    def loss(theta):
        logits = bank.discrimination @ theta - bank.difficulty
        return -(answers * logits - np.logaddexp(0, logits)).sum() + 0.5 * theta @ theta

    reference = minimize(loss, np.zeros(size), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    assert found == pytest.approx(reference.x, abs=1e-5)
    gradient = bank.discrimination.T @ (answers - sigmoid(bank.discrimination @ found - bank.difficulty)) - found
    assert np.abs(gradient).max() < 1e-6


def test_many_regressions_at_once_are_those_one_by_one():
    rng = np.random.default_rng(0)
    design, offset = rng.normal(size=(30, 3)), rng.normal(size=30)
    answers = rng.random((5, 30))
    answers[rng.random((5, 30)) < 0.3] = np.nan
    mean, precision = np.array([0.5, 0.0, -0.5]), np.diag([1.0, 2.0, 0.1])
    together, _ = posterior_mode(design, offset, answers, mean=mean, precision=precision)
    for row, found in zip(answers, together, strict=True):
        given = ~np.isnan(row)
        (alone,), _ = posterior_mode(design[given], offset[given], row[None, given], mean=mean, precision=precision)
        assert found == pytest.approx(alone, abs=1e-8)


def test_items_of_other_programs_mean_the_same_after_conversion():
    rng = np.random.default_rng(0)
    a, theta = rng.normal(size=(7, 3)), rng.normal(size=(4, 3))
    scalar, vector = rng.normal(size=7), rng.normal(size=(7, 3))
    summed = (theta[:, None, :] * a - scalar[:, None]).sum(axis=2)
    assert from_scalar_difficulty(a, scalar).probability(theta) == pytest.approx(sigmoid(summed))
    inside = (a * (theta[:, None, :] - vector)).sum(axis=2)
    assert from_vector_difficulty(a, vector).probability(theta) == pytest.approx(sigmoid(inside))


def test_as_many_dimensions_are_chosen_as_predict():
    rng = np.random.default_rng(0)
    _, _, _, _, plain = simulated(0, num_models=100)
    assert choose_dimensions(plain, rng, (1, 2)) == 1
    assert choose_dimensions(plain[:15], rng) == 1
    loadings = np.zeros((200, 2))
    loadings[np.arange(200), (np.arange(200) // 2) % 2] = 3.0
    chance = sigmoid(rng.normal(size=(100, 2)) @ loadings.T - rng.normal(size=200))
    assert choose_dimensions((rng.random(chance.shape) < chance).astype(float), rng, (1, 2)) == 2
