"""The objective, its gradient and its course along a segment, against dense matrices and loops over pairs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mergetool.kernels.matching import curve, gradients, objective, waiting_scores
from mergetool.kernels.permute import Element
from mergetool.kernels.soft import Soft
from mergetool.kernels.spaces import length
from tests.kernels import toys

NUM_MODELS = 3


def axis_matrix(element, layout):
    """The dense matrix by which an element acts on a whole axis."""
    index, sign = element.along(layout)
    size = length(layout)
    index = torch.arange(size) if index is None else index
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[torch.arange(size), index] = 1.0 if sign is None else sign.double()
    return matrix


def soft_matrix(soft, layout):
    return sum(share * axis_matrix(element, layout) for share, element in zip(soft.shares, soft.elements, strict=True))


def images(layouts, model, matrix_of_axis):
    """Every tensor with a dense matrix applied to every axis."""
    out = {}
    for name, axes in layouts.items():
        x = model[name]
        for a, layout in enumerate(axes):
            x = torch.tensordot(matrix_of_axis(layout), x, dims=([1], [a])).movedim(0, a)
        out[name] = x
    return out


def naive_terms(toy, models, matrices):
    """Sum over pairs for every tensor; `matrices[i](layout)` is model i's dense matrix on an axis."""
    _, layouts = toy
    mapped = [images(layouts, model, matrix) for model, matrix in zip(models, matrices, strict=True)]
    return {name: sum((a[name] * b[name]).sum() for a, b in combinations(mapped, 2)) for name in layouts}


def naive(toy, models, point):
    matrices = [lambda layout, soft=soft: soft_matrix(soft, layout) for soft in point]
    return sum(naive_terms(toy, models, matrices).values())


def random_point(problem, seed, num_elements):
    """Soft elements of `num_elements` random elements with random shares, one per model."""
    generator = torch.Generator().manual_seed(seed)
    point = []
    for _ in problem.models:
        soft = Soft.at(Element.random(problem.spaces, generator), problem.faces)
        for _ in range(num_elements - 1):
            step = float(torch.rand(1, generator=generator))
            other = Soft.at(Element.random(problem.spaces, generator), problem.faces)
            soft = soft.toward(other, step)
        point.append(soft)
    return tuple(point)


@pytest.fixture(params=toys.NETWORKS)
def case(request):
    toy = toys.NETWORKS[request.param]()
    models = [toys.weights(toy[1], seed) for seed in range(NUM_MODELS)]
    return toy, models, toys.problem(toy, models)


def test_the_half_norm_form_equals_the_sum_over_pairs(case):
    toy, models, problem = case
    for num_elements in (1, 3):
        point = random_point(problem, 5, num_elements)
        assert objective(problem, point) == pytest.approx(float(naive(toy, models, point)), rel=1e-9)


def test_the_gradient_agrees_with_autograd_in_every_direction(case):
    toy, models, problem = case
    point, target = random_point(problem, 1, 2), random_point(problem, 2, 1)
    for i in range(NUM_MODELS):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        matrices = [lambda layout, soft=soft: soft_matrix(soft, layout) for soft in point]
        matrices[i] = lambda layout, i=i, t=t: (
            (1 - t) * soft_matrix(point[i], layout) + t * soft_matrix(target[i], layout)
        )
        (slope,) = torch.autograd.grad(sum(naive_terms(toy, models, matrices).values()), t)
        ours = 0.0
        for _, scores in gradients(problem, point, [i]):
            for face, score in scores.items():
                ours += float((score[0] * (target[i].matrix(face) - point[i].matrix(face))).sum())
        assert ours == pytest.approx(float(slope), rel=1e-9)


def test_gradients_of_several_models_at_once_equal_those_one_by_one(case):
    _, _, problem = case
    point = random_point(problem, 1, 2)
    together = dict(gradients(problem, point, [2, 0]))
    assert sorted(together) == list(range(len(problem.families)))
    for j, i in enumerate([2, 0]):
        for f, alone in gradients(problem, point, [i]):
            for face, score in alone.items():
                torch.testing.assert_close(together[f][face][j], score[0])


def test_euler_the_gradient_against_the_point_counts_every_term_once_per_moving_axis_and_model(case):
    toy, models, problem = case
    point = random_point(problem, 7, 2)
    against = sum(
        float((score[i] * point[i].matrix(face)).sum())
        for _, scores in gradients(problem, point, range(NUM_MODELS))
        for face, score in scores.items()
        for i in range(NUM_MODELS)
    )
    terms = naive_terms(toy, models, [lambda layout, soft=soft: soft_matrix(soft, layout) for soft in point])
    _, layouts = toy
    moving = {
        name: sum(any(f.space is not None for segment in layout for f in segment) for layout in axes)
        for name, axes in layouts.items()
    }
    assert against == pytest.approx(sum(2 * moving[name] * float(terms[name]) for name in terms), rel=1e-9)


@pytest.mark.parametrize("movers", [[0, 1, 2], [1], [0, 2]])
def test_the_curve_is_the_objective_along_the_segment(case, movers):
    _, _, problem = case
    start, other = random_point(problem, 3, 2), random_point(problem, 4, 2)
    end = tuple(other[i] if i in movers else start[i] for i in range(NUM_MODELS))
    bernstein = curve(problem, start, end, movers=movers)
    constant = objective(problem, start) - bernstein[0]
    for t in (0.0, 0.3, 0.77, 1.0):
        basis = [1, 4, 6, 4, 1] * np.array([t**m * (1 - t) ** (4 - m) for m in range(5)])
        between = tuple(s if s is e else s.toward(e, t) for s, e in zip(start, end, strict=True))
        assert objective(problem, between) == pytest.approx(float(basis @ bernstein) + constant, rel=1e-9)


def test_float32_models_give_the_objective_to_seven_digits(case):
    toy, models, problem = case
    single = [{name: x.float() for name, x in model.items()} for model in models]
    point = random_point(problem, 5, 3)
    scale = sum(float(x.square().sum()) for model in models for x in model.values())
    ours = objective(toys.problem(toy, single), point)
    assert abs(ours - objective(problem, point)) < 1e-7 * scale
    half = [{name: x.bfloat16() for name, x in model.items()} for model in models]
    assert toys.problem(toy, half).stack(0).dtype == torch.float32


def test_weighting_makes_every_tensor_count_alike(case):
    toy, models, _ = case
    weighted = toys.problem(toy, models, per_tensor=True)
    blown_up = [model | {name: 100 * model[name] for name in list(model)[:1]} for model in models]
    point = random_point(weighted, 0, 2)
    assert objective(toys.problem(toy, blown_up, per_tensor=True), point) == pytest.approx(
        objective(weighted, point), rel=1e-9
    )


def test_a_tensor_of_zeros_weighs_nothing():
    toy = toys.mlp(3, 4, 2)
    models = [toys.weights(toy[1], seed) | {"b0": torch.zeros(4).double()} for seed in range(2)]
    problem = toys.problem(toy, models, per_tensor=True)
    assert np.isfinite(objective(problem, random_point(problem, 0, 1)))


def test_models_are_not_changed_and_may_require_gradients(case):
    toy, models, _ = case
    live = [{name: x.clone().requires_grad_() for name, x in model.items()} for model in models]
    problem = toys.problem(toy, live)
    point = random_point(problem, 0, 2)
    for _, scores in gradients(problem, point, [0, 1]):
        assert not any(score.requires_grad for score in scores.values())
    assert all(torch.equal(x[name], y[name]) for x, y in zip(live, models, strict=True) for name in x)


def test_the_work_of_an_iteration_grows_like_the_number_of_models():
    toy = toys.mlp(6, 16, 12, 4)
    work = {}
    for num_models in (3, 6, 12):
        problem = toys.problem(toy, [toys.weights(toy[1], seed) for seed in range(num_models)])
        start, end = random_point(problem, 0, 2), random_point(problem, 1, 1)
        with FlopCounterMode(display=False) as counter:
            for _ in gradients(problem, start, range(num_models)):
                pass
            curve(problem, start, end, movers=range(num_models))
        work[num_models] = counter.get_total_flops()
    assert work[12] - work[6] == 2 * (work[6] - work[3])
    assert work[12] < 4.01 * work[3]


def test_scores_wait_for_the_last_place_of_their_family_and_no_longer():
    problem = toys.problem(
        toys.mlp(3, 4, 5, 6, 2), [toys.weights(toys.mlp(3, 4, 5, 6, 2)[1], seed) for seed in range(2)]
    )
    assert waiting_scores(problem.pieces, problem.families) == 5**2 + 6**2
    point = random_point(problem, 1, 1)
    assert [f for f, _ in gradients(problem, point, [0, 1])] == list(range(len(problem.families)))
