"""Hard moves: git-rebasin and MergeMany recover planted orders, and stop where no single move gains."""

import pytest
import torch

from mergetool.kernels.assignment import best_element
from mergetool.kernels.matching import gradients, objective
from mergetool.kernels.permute import Element
from mergetool.kernels.weight_matching import ascend, hard_point, match_to_reference
from tests.kernels import toys


@pytest.mark.parametrize("name", ["convnet", "vit", "llama"])
def test_models_matched_to_a_reference_take_its_order(name):
    toy = toys.NETWORKS[name]()
    _, models, _ = toys.planted(toy, 3, 0)
    elements = match_to_reference(toys.problem(toy, models), 1)
    for element, model in zip(elements, models, strict=True):
        for name, layouts in toy[1].items():
            torch.testing.assert_close(element.apply(model[name], layouts), models[1][name])


@pytest.mark.parametrize("name", toys.NETWORKS)
def test_ascent_only_climbs_and_ends_where_no_single_move_gains(name):
    toy = toys.NETWORKS[name]()
    models = [toys.weights(toy[1], seed) for seed in range(3)]
    problem = toys.problem(toy, models)
    start = hard_point(problem, [Element.identity(toy[0])] * 3)
    point, history = ascend(problem, start, range(3))
    assert history[0] == objective(problem, start)
    assert list(history) == sorted(history)
    assert history[-1] == pytest.approx(objective(problem, point), rel=1e-9)
    assert len(history) > 1
    for _, scores in gradients(problem, point, range(3)):
        for i in range(3):
            own = {face: score[i].numpy() for face, score in scores.items()}
            here = sum(float((own[face] * point[i].matrix(face).numpy()).sum()) for face in own)
            if name not in ("vit",):  # there one space is on both axes of a tensor: not linear
                assert best_element(toy[0], own).value <= here + 1e-8 * history[-1]


def test_a_space_on_both_axes_of_a_tensor_is_judged_by_the_true_change():
    spaces, layouts = toys.network(
        toys.space_map(toys.Space("a", 6)), {"square": [[["a"]], [["a"]]], "bias": [[["a"]]]}
    )
    for seed in range(10):
        models = [toys.weights(layouts, 10 * seed + i) for i in range(2)]
        problem = toys.problem((spaces, layouts), models)
        _, history = ascend(problem, hard_point(problem, [Element.identity(spaces)] * 2), [0, 1])
        assert list(history) == sorted(history)


def test_models_that_do_not_move_stay():
    toy = toys.mlp(6, 9, 8, 4)
    _, models, _ = toys.planted(toy, 3, 0)
    problem = toys.problem(toy, models)
    start = hard_point(problem, [Element.identity(toy[0])] * 3)
    point, _ = ascend(problem, start, [2])
    assert point[0] is start[0]
    assert point[1] is start[1]
    assert not point[2].elements[0].equals(start[2].elements[0])
