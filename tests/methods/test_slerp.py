"""Spherical interpolation, against the textbook formula in float64, and at the ends and singularities of the path."""

import json
import math

import pytest
import torch

import mergetool
from mergetool import RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, read, toy_models, uniform, write


def slerp(a, b, t):
    """`sin((1 - t) w) / sin w * a + sin(t w) / sin w * b` in float64, w the angle between the two as vectors."""
    a, b = a.double(), b.double()
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    w = math.acos(cosine)
    return (math.sin((1 - t) * w) * a + math.sin(t * w) * b) / math.sin(w)


def merged(a, b, t=0.5, **more):
    return merge_state_dicts("slerp", {"a": {"w": a}, "b": {"w": b}}, t=t, **more)["w"]


@pytest.mark.parametrize("t", [-0.7, 0.0, 0.1, 0.5, 1.0, 1.5])
def test_every_tensor_follows_the_formula_in_float64(t):
    _, fine_tunes = toy_models("ab", exact=False)
    strangers = {name: toy_models(name, seed, exact=False)[1][name] for seed, name in enumerate("ab")}
    for models in (fine_tunes, strangers):
        expected = {name: slerp(value, models["b"][name], t) for name, value in models["a"].items()}
        assert_near(merge_state_dicts("slerp", models, t=t), expected, tolerance=1e-6)


def test_the_ends_of_the_path_are_the_models_to_the_bit():
    _, models = toy_models("ab", exact=False)
    for state, values in zip(models.values(), ([-0.0, 1.0, 2.0], [1.0, -0.0, 3.0]), strict=True):
        state["zeros"] = torch.tensor(values)
    assert_same_bytes(merge_state_dicts("slerp", models, t=0.0), models["a"])
    assert_same_bytes(merge_state_dicts("slerp", models, t=1.0), models["b"])


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
def test_equal_norms_are_kept(t):
    a, b = (uniform((40, 30), name) for name in "ab")
    b = b * (a.norm() / b.norm())
    assert merged(a, b, t).norm().item() == pytest.approx(a.norm().item(), rel=1e-6)


def test_half_way_between_perpendicular_vectors_is_the_diagonal():
    found = merged(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(found, torch.full((2,), 3 / math.sqrt(2)))


def test_coefficients_come_from_directions_and_act_on_the_vectors_themselves():
    found = merged(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 10.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 10.0]) / math.sqrt(2))


def test_the_angle_is_that_of_the_whole_tensor_not_of_its_rows():
    a, b = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert math.acos(float((a * b).sum() / a.norm() / b.norm())) == pytest.approx(math.pi / 3)
    torch.testing.assert_close(merged(a, b), (a + b) * math.sin(math.pi / 6) / math.sin(math.pi / 3))


@pytest.mark.parametrize(
    ("a", "b", "remark"),
    [
        ([1.0, 2.0], [2.0, 4.0], "almost parallel tensors: linear interpolation"),
        ([1.0, 2.0], [-1.0, -2.0], "opposite tensors: linear interpolation"),
        ([0.0, 0.0], [2.0, 4.0], "one model's tensor is zero: linear interpolation"),
        ([1.0, 2.0], [0.0, 0.0], "one model's tensor is zero: linear interpolation"),
    ],
)
def test_where_there_is_no_circle_a_straight_line_is_taken_and_noted(a, b, remark, tmp_path):
    a, b = torch.tensor(a), torch.tensor(b)
    paths = write(tmp_path, {"a": {"w": a}, "b": {"w": b}})
    recipe = {"models": {n: str(p) for n, p in paths.items()}, "merge": {"method": "slerp", "t": 0.25}}
    result = mergetool.run(recipe, output=tmp_path / "out")
    torch.testing.assert_close(read(result.path)["w"], 0.75 * a + 0.25 * b)
    assert result.notes == {remark: 1}
    assert remark in json.dumps(json.loads((result.path / "mergetool.json").read_text()))


def test_just_below_the_limit_the_circle_is_still_taken():
    for cosine, is_line in ((0.9996, True), (0.9994, False)):
        b = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
        line = 0.7 * torch.tensor([1.0, 0.0]) + 0.3 * b
        found = merged(torch.tensor([1.0, 0.0]), b, 0.3)
        assert (float((found - line).abs().max()) < 1e-7) == is_line
        torch.testing.assert_close(found.double(), slerp(torch.tensor([1.0, 0.0]), b, 0.3), rtol=0, atol=1e-6)


def test_vectors_of_extreme_length_do_not_overflow_or_vanish():
    a, b = (uniform((50,), name) for name in "ab")
    for factor in (2.0**60, 2.0**-60):
        found = merged(a * factor, b * factor, 0.3) / factor
        torch.testing.assert_close(found.double(), slerp(a, b, 0.3), rtol=0, atol=1e-6)


def test_t_can_change_with_depth():
    _, models = toy_models("ab")
    found = merge_state_dicts("slerp", models, t={"gradient": [0.0, 1.0]})
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert found[first].equal(models["a"][first])
    assert found[last].equal(models["b"][last])


@pytest.mark.parametrize("names", ["a", "abc"])
def test_two_models_are_needed_and_enough(names):
    with pytest.raises(RecipeError, match=r"slerp (needs at least|takes at most) 2 models"):
        merge_state_dicts("slerp", toy_models(names)[1])
