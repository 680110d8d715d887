"""Alignment of several models: planted solutions, monotone runs, and everything that must not matter."""

from dataclasses import replace
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch

from mergetool.kernels.frank_wolfe import AlignmentSettings, align, best_step, in_universe_of, value_at
from mergetool.kernels.matching import objective
from mergetool.kernels.permute import Element
from mergetool.kernels.weight_matching import hard_point, merge_many
from tests.files import LONG
from tests.kernels import toys

ONE_START = AlignmentSettings(starts=1, releases=4)


def inverses(elements):
    return [element.inverse() for element in elements]


def same(elements, others):
    return all(a.equals(b) for a, b in zip(elements, others, strict=True))


CASES = [(name, n, noise) for name in toys.NETWORKS for n in (2, 3, 5, 10) for noise in (0.0, 0.1)]
SOME = [("mlp", 2, 0.0), ("mlp", 10, 0.1), ("convnet", 5, 0.1), ("vit", 2, 0.1), ("vit", 3, 0.0), ("llama", 3, 0.1)]
"""In the suite ten models of one network only, and each number of models and each network once or twice."""


@pytest.mark.parametrize(("name", "num_models", "noise"), CASES if LONG else SOME)
def test_planted_elements_are_found_exactly(name, num_models, noise):
    toy = toys.NETWORKS[name]()
    universe, models, elements = toys.planted(toy, num_models, 0, noise=noise)
    result = align(toys.problem(toy, models), AlignmentSettings(releases=4))  # which are not what finds them
    assert same(result.elements, in_universe_of(inverses(elements), 0))
    if noise == 0:
        for aligned in toys.to_universe(toy, models, result.elements):
            assert all(torch.equal(aligned[name], models[0][name]) for name in universe)


def test_planted_elements_are_found_from_float32():
    toy = toys.vit()
    _, models, elements = toys.planted(toy, 3, 1, noise=0.1, dtype=torch.float32)
    result = align(toys.problem(toy, models), ONE_START)
    assert same(result.elements, in_universe_of(inverses(elements), 0))


@pytest.mark.parametrize("mode", ["joint", "block"])
@pytest.mark.parametrize("init", ["identity", "barycenter"])
def test_every_mode_and_init_ends_at_least_as_high_as_the_identity(mode, init):
    toy = toys.mlp(6, 9, 8, 4)
    models = [toys.weights(toy[1], seed) for seed in range(4)]
    problem = toys.problem(toy, models)
    identity = hard_point(problem, [Element.identity(toy[0])] * 4)
    for polish in (True, False):
        result = align(problem, AlignmentSettings(mode=mode, init=init, polish=polish, starts=1, releases=4))
        assert result.objective >= objective(problem, identity)
        assert result.objective == pytest.approx(objective(problem, hard_point(problem, inverses(result.elements))))


MODES = [("mlp", "joint"), ("convnet", "block"), ("vit", "block"), ("llama", "joint")]


@pytest.mark.parametrize(("name", "mode"), list(product(toys.NETWORKS, ["joint", "block"])) if LONG else MODES)
def test_the_objective_never_falls_the_gap_is_never_negative_and_polish_never_loses(name, mode):
    toy = toys.NETWORKS[name]()
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    problem = toys.problem(toy, models)
    result = align(problem, AlignmentSettings(mode=mode, starts=1, releases=4))
    start = objective(problem, hard_point(problem, [Element.identity(toy[0])] * 3))
    reached = [start, *(step.objective for step in result.history)]
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in pairwise(reached))
    assert all(step.gap >= -1e-9 * abs(step.objective) for step in result.history)
    assert len(result.history) > 2
    assert result.objective >= result.rounded


WAYS = [("joint", "identity"), ("block", "identity"), ("joint", "barycenter"), ("block", "barycenter")]
IN_WAYS = [(name, *way) for place, name in enumerate(toys.NETWORKS) for way in (WAYS if LONG else [WAYS[place % 4]])]


@pytest.mark.parametrize(("name", "mode", "init"), IN_WAYS)
def test_images_that_are_held_and_updated_equal_images_made_anew(name, mode, init, monkeypatch):
    toy = toys.NETWORKS[name]()
    problem = toys.problem(toy, [toys.weights(toy[1], seed) for seed in range(3)])
    settings = AlignmentSettings(mode=mode, init=init, starts=1, releases=1, iterations=4 if LONG else 2)
    held = align(problem, settings)
    monkeypatch.setattr("mergetool.kernels.frank_wolfe.HELD", 0)
    anew = align(problem, settings)
    assert same(held.elements, anew.elements)
    assert [step.objective for step in held.history] == pytest.approx([step.objective for step in anew.history])


def test_more_starts_are_never_worse():
    toy = toys.mlp(4, 7, 7, 3)
    problem = toys.problem(toy, [toys.weights(toy[1], i) for i in range(3)])
    values = [align(problem, AlignmentSettings(starts=starts, releases=0)).objective for starts in (1, 2, 5)]
    assert values == sorted(values)


@pytest.mark.parametrize("name", toys.NETWORKS if LONG else ["mlp", "convnet", "llama"])
def test_the_result_is_never_below_that_of_hard_moves_alone(name):
    toy = toys.NETWORKS[name]()
    for seed in range(2 if LONG else 1):
        problem = toys.problem(toy, [toys.weights(toy[1], 10 * seed + i) for i in range(3)])
        _, sweeps = merge_many(problem)
        result = align(problem, AlignmentSettings(releases=1, iterations=25 if LONG else 12))
        assert result.objective >= sweeps[-1] * (1 - 1e-12)
        assert [step.objective for step in result.history] == sorted(step.objective for step in result.history)


def test_two_models_are_aligned_by_holding_one():
    """With both free from the identity, steps turn each to where the other was (0 of 6 recovered); held, all are."""
    toy = toys.mlp(6, 12, 12, 3)
    for seed in range(6):
        _, models, elements = toys.planted(toy, 2, seed)
        result = align(toys.problem(toy, models), ONE_START)
        assert same(result.elements, in_universe_of(inverses(elements), 0))
        assert len(result.history) < 20


@pytest.mark.parametrize("name", toys.NETWORKS)
def test_perturbed_copies_of_one_network_stay_as_they_are_after_one_look(name):
    toy = toys.NETWORKS[name]()
    universe = toys.weights(toy[1], 0)
    noise = [toys.weights(toy[1], seed) for seed in range(1, 4)]
    models = [{k: universe[k] + 0.05 * own[k] for k in universe} for own in noise]
    result = align(toys.problem(toy, models), AlignmentSettings(starts=5))
    assert same(result.elements, [Element.identity(toy[0])] * 3)
    assert len(result.history) == 1


def test_the_order_of_the_models_does_not_matter_to_the_joint_mode():
    toy = toys.mlp(6, 9, 8, 4)
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    values = []
    for order in permutations(range(3)):
        result = align(
            toys.problem(toy, [models[i] for i in order]), AlignmentSettings(starts=1, polish=False, releases=4)
        )
        values.append(result.objective)
    assert values == pytest.approx([values[0]] * 6, rel=1e-9)


def test_a_model_in_another_order_gives_the_same_aligned_weights():
    toy = toys.vit()
    _, models, _ = toys.planted(toy, 3, 2, noise=0.1)
    other = Element.random(toy[0], torch.Generator().manual_seed(9))
    moved = [models[0], {k: other.apply(x, toy[1][k]) for k, x in models[1].items()}, models[2]]
    ours, theirs = (
        toys.to_universe(toy, each, align(toys.problem(toy, each), AlignmentSettings(releases=2)).elements)
        for each in (models, moved)
    )
    assert all(torch.equal(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in a)


def test_the_universe_is_in_the_order_of_the_anchor_and_nothing_else_depends_on_it():
    toy = toys.mlp(6, 9, 8, 4)
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    problem = toys.problem(toy, models)
    none, *found = (align(problem, replace(ONE_START, anchor=anchor)) for anchor in (None, 0, 1, 2))
    for anchor, here in enumerate(found):
        assert here.elements[anchor].equals(Element.identity(toy[0]))
        assert here.objective == none.objective
        for i, j in product(range(3), repeat=2):
            assert (here.elements[i] @ here.elements[j].inverse()).equals(none.elements[i] @ none.elements[j].inverse())


def test_cycles_compose_to_the_identity():
    toy = toys.llama()
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    p = align(toys.problem(toy, models), AlignmentSettings(starts=1, releases=1, iterations=4)).elements
    identity = Element.identity(toy[0])

    def pair(i, j):
        return p[i] @ p[j].inverse()

    for i in range(3):
        assert pair(i, i).equals(identity)
        for j in range(3):
            assert pair(i, j).equals(pair(j, i).inverse())
            assert all((pair(i, j) @ pair(j, k) @ pair(k, i)).equals(identity) for k in range(3))


def test_dead_and_duplicated_neurons_are_settled_the_same_way_every_time():
    toy = toys.mlp(6, 12, 12, 3)
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    for model in models:
        for name, rows in (("w0", True), ("b0", True), ("w1", False)):
            part = model[name] if rows else model[name].T
            part[3:6] = 0  # dead
            part[8] = part[7]  # duplicated
    first, again = (align(toys.problem(toy, models), AlignmentSettings(releases=4)) for _ in range(2))
    assert same(first.elements, again.elements)
    assert first.history == again.history


def test_threads_change_nothing():
    toy = toys.mlp(6, 140, 130, 3)
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    settings = AlignmentSettings(starts=1, iterations=2, polish=False)
    alone = align(toys.problem(toy, models), settings)
    torch.set_num_threads(2)
    try:
        assert same(align(toys.problem(toy, models), settings).elements, alone.elements)
    finally:
        torch.set_num_threads(1)


def test_one_model_is_too_few():
    toy = toys.mlp(3, 4, 2)
    with pytest.raises(ValueError, match="two models or more, got 1"):
        align(toys.problem(toy, [toys.weights(toy[1], 0)]), AlignmentSettings())


def test_the_best_step_beats_a_fine_grid():
    generator = np.random.default_rng(0)
    grid = np.linspace(0, 1, 2001)
    for _ in range(200):
        bernstein = generator.normal(size=5)
        best = best_step(bernstein)
        assert 0 <= best <= 1
        assert value_at(bernstein, best) >= max(value_at(bernstein, t) for t in grid[::20])


def test_the_best_step_of_a_line_a_parabola_and_nothing():
    assert best_step(np.linspace(0.0, 1.0, 5)) == 1.0
    assert best_step(np.linspace(1.0, 0.0, 5)) == 0.0
    assert best_step(np.zeros(5)) == 1.0  # equal everywhere: the later
    parabola = [t * (0.8 - t) for t in (0, 0.25, 0.5, 0.75, 1)]
    t = np.linspace(0, 1, 5)
    basis = np.stack([np.array([1, 4, 6, 4, 1])[m] * t**m * (1 - t) ** (4 - m) for m in range(5)], axis=1)
    assert best_step(np.linalg.solve(basis, parabola)) == pytest.approx(0.4, abs=1e-6)


def test_letting_two_models_go_at_once_gains_where_no_single_move_does():
    toy = toys.mlp(6, 14, 14, 4)
    gains = []
    for seed in range(3 if LONG else 1):
        models = [toys.weights(toy[1], 10 * seed + i) for i in range(4)]
        problem = toys.problem(toy, models)
        without, released = (align(problem, AlignmentSettings(releases=count)) for count in (0, 10))
        assert released.objective == pytest.approx(objective(problem, hard_point(problem, inverses(released.elements))))
        gains.append(released.objective / without.objective - 1)
    assert min(gains) >= 0
    assert max(gains) > 2e-3
