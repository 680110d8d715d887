"""Curves and arcs through models: Bezier's against de Casteljau's construction, an arc between aligned networks."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import mergetool
from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, read, toy_models
from tests.alignment import nets
from tests.arch.networks import MLP
from tests.files import write_model

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
@pytest.mark.parametrize("t", [0.25, 0.6])
def test_a_point_is_that_of_de_casteljau(names, t):
    _, models = toy_models(names, exact=False)
    found = merge_state_dicts("bezier", models, t=t)
    points = [{name: value.double() for name, value in state.items()} for state in models.values()]
    while len(points) > 1:
        pairs = pairwise(points)
        points = [{name: torch.lerp(one[name], other[name], t) for name in one} for one, other in pairs]
    assert_near(found, points[0], tolerance=1e-6)


@pytest.mark.parametrize(("t", "name"), [(0.0, "a"), (1.0, "c")])
def test_its_ends_are_the_first_and_the_last_model(t, name):
    _, models = toy_models()
    assert_same_bytes(merge_state_dicts("bezier", models, t=t), models[name])


@pytest.mark.parametrize("name", ["bezier", "plane"])
def test_its_recipe_writes_every_point(name, tmp_path):
    document = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    _, models = toy_models(document["models"], exact=False)
    for key, state in models.items():
        write_model(tmp_path / "models" / key, state)
    results = mergetool.run(mergetool.load_recipe(document, folder=tmp_path)).results
    assert len(results) == len(next(iter(document["sweep"].values())))
    assert_same_bytes(read(results[0]), models["first"])


def test_the_ends_of_an_arc_between_aligned_networks_are_networks_that_answer_alike(tmp_path):
    document = yaml.safe_load((RECIPES / "geodesic.yaml").read_text())
    document["models"]["aligned"]["recipe"]["architecture"] = "mlp"
    first, second = nets.mlp(seed=0), nets.mlp(seed=1)
    for name, state in {"first": first, "second": second}.items():
        write_model(tmp_path / "models" / name, state)
    results = mergetool.run(mergetool.load_recipe(document, folder=tmp_path)).results
    assert_same_bytes(read(results[0]), first)
    x, network = torch.randn(5, 6), MLP((6, 20, 16, 4)).eval()
    answers = []
    for state in (second, read(results[-1])):
        network.load_state_dict(state)
        answers.append(network(x))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-5)
    assert not read(results[-1])[next(iter(second))].equal(next(iter(second.values())))
    assert [path.name for path in results] == ["t-0", "t-0.25", "t-0.5", "t-0.75", "t-1"]
