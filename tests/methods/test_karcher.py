"""The Karcher mean is where the arcs to all models cancel; against the same steps with whole vectors in float64."""

import math

import pytest
import torch

from mergetool import PlanError, RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near, toy_base, toy_models, uniform


def naive(vectors, shares, max_iter, tol):
    norms = [float(x.norm()) for x in vectors]
    length = sum(s * n for s, n in zip(shares, norms, strict=True))
    held = [(x / n, s) for x, n, s in zip(vectors, norms, shares, strict=True) if n and s]
    if not held:
        return torch.zeros_like(vectors[0])
    point = sum(s * u for u, s in held)
    point = point / point.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(point)
        for unit, share in held:
            angle = math.acos(max(-1.0, min(1.0, float(point @ unit))))
            if angle >= tol:
                step += share / sum(s for _, s in held) * angle / math.sin(angle) * (unit - (point @ unit) * point)
        if float(step.norm()) < tol:
            break
        point = step.norm().cos() * point + step.norm().sin() * step / step.norm()
        point = point / point.norm()
    return length * point


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("max_iter", [0, 1, 3, 100])
def test_it_takes_the_steps_along_the_arcs(with_base, max_iter):
    base, models = toy_models("abc", exact=False)
    settings = {"weight": {"a": 0.5, "b": 2.0, "c": 1.0}, "max_iter": max_iter, "tol": 1e-5}
    merged = merge_state_dicts("karcher", models, base if with_base else None, dtype="float64", **settings)
    for name, value in base.items():
        centre = value.double() if with_base else torch.zeros_like(value).double()
        vectors = [(models[m][name].double() - centre).flatten() for m in "abc"]
        expected = centre + naive(vectors, (0.5 / 3.5, 2 / 3.5, 1 / 3.5), max_iter, 1e-5).view(value.shape)
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-5, atol=1e-6)


def test_at_the_mean_the_arcs_to_all_models_cancel():
    models = {name: {"w": uniform((40,), name).double()} for name in "abcd"}
    units = [one["w"] / one["w"].norm() for one in models.values()]
    mean = merge_state_dicts("karcher", models, tol=1e-12)["w"]
    mean = mean / mean.norm()
    arcs = [torch.acos(mean @ u) * (u - (mean @ u) * mean) / (u - (mean @ u) * mean).norm() for u in units]
    assert float(sum(arcs).norm()) < 1e-6


def test_of_two_directions_it_is_the_middle_of_the_arc():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(2.5), math.sin(2.5)])
    merged = merge_state_dicts("karcher", {"a": {"w": a}, "b": {"w": 3 * b}})["w"]
    torch.testing.assert_close(merged, 2 * torch.tensor([math.cos(1.25), math.sin(1.25)]))


def test_a_zero_tensor_has_a_length_but_no_direction():
    a = torch.tensor([2.0, 0.0])
    assert merge_state_dicts("karcher", {"a": {"w": a}, "b": {"w": 0 * a}})["w"].tolist() == [1.0, 0.0]


def test_small_tensors_are_merged_like_large_ones():
    """mergekit takes those no longer than `tol` for zero."""
    models = {name: {"w": 1e-8 * uniform((30,), name)} for name in "ab"}
    large = {name: {"w": 1e8 * one["w"]} for name, one in models.items()}
    found = {"w": 1e8 * merge_state_dicts("karcher", models)["w"]}
    assert_near(found, merge_state_dicts("karcher", large), tolerance=1e-5)


def test_directions_that_cancel_end_somewhere_finite():
    x = torch.tensor([1.0, 2.0])
    found = merge_state_dicts("karcher", {"a": {"w": x}, "b": {"w": -x}})["w"]
    assert float(found.norm()) == pytest.approx(float(x.norm()))


def test_weights_must_not_all_be_zero_nor_one_negative():
    models = {name: toy_base(name) for name in "ab"}
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts("karcher", models, weight=0.0)
    with pytest.raises(RecipeError, match="weight"):
        merge_state_dicts("karcher", models, weight={"a": 1.0, "b": -0.5})
