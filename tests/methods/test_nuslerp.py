"""NuSLERP against the great circle written out in float64, and at its ends."""

import math

import pytest
import torch

import mergetool
from mergetool import PlanError, merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models


def circle(a, b, t):
    """From a to b, as flat vectors."""
    if not (float(a.norm()) and float(b.norm())):
        return (1 - t) * a + t * b
    cosine = float((a @ b) / a.norm() / b.norm())
    if 1 - cosine**2 <= 1e-6:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def naive(a, b, t, per):
    """Of whole tensors, of rows, or of columns."""
    if per == "tensor" or a.dim() < 2:
        return circle(a.flatten(), b.flatten(), t).view(a.shape)
    if a.numel() == 0:
        return a
    x, y = (m.flatten(1) if per == "row" else m.flatten(1).T for m in (a, b))
    found = torch.stack([circle(one, other, t) for one, other in zip(x, y, strict=True)])
    return (found if per == "row" else found.T).reshape(a.shape)


@pytest.mark.parametrize("per", ["tensor", "row", "column"])
@pytest.mark.parametrize("with_base", [True, False])
def test_it_is_the_great_circle(per, with_base):
    base, models = toy_models("ab", exact=False)
    merged = merge_state_dicts(
        "nuslerp", models, base if with_base else None, per=per, weight={"a": 0.6, "b": 1.8}, dtype="float64"
    )
    for name, value in base.items():
        centre = value.double() if with_base else torch.zeros_like(value).double()
        expected = centre + naive(*(models[m][name].double() - centre for m in "ab"), 0.75, per)
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("per", ["tensor", "row", "column"])
def test_weights_of_zero_and_one_give_an_end_of_the_path(per):
    base, models = toy_models("ab", exact=False)
    assert_near(merge_state_dicts("nuslerp", models, base, per=per, weight={"a": 0.0, "b": 2.0}), models["b"])


@pytest.mark.parametrize("factor", [2.0, -1.0, -2.0, 0.0])
def test_where_there_is_no_circle_the_straight_line_is_taken(factor):
    x = torch.tensor([[0.3, -0.7], [0.1, 0.2]])
    models = {"a": {"w": x}, "b": {"w": factor * x}}
    for per in ("tensor", "row", "column"):
        merged = merge_state_dicts("nuslerp", models, weight={"a": 3.0, "b": 1.0}, per=per)
        torch.testing.assert_close(merged["w"], (0.75 + 0.25 * factor) * x)


def test_rows_and_columns_keep_their_own_lengths():
    a, b = torch.eye(2), torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    for per in ("row", "column"):
        merged = merge_state_dicts("nuslerp", {"a": {"w": a}, "b": {"w": b}}, per=per)["w"]
        torch.testing.assert_close(merged, math.sqrt(0.5) * (a + b))


def test_weights_that_cancel_have_no_place_between_the_models():
    base, models = toy_models("ab")
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts("nuslerp", models, base, weight={"a": 1.0, "b": -1.0})


def test_a_base_is_the_centre_only_if_there_is_one():
    base, models = toy_models("ab")
    with_base = mergetool.merge_state_dicts("nuslerp", models, base)["logit_scale"]
    torch.testing.assert_close(with_base, (models["a"]["logit_scale"] + models["b"]["logit_scale"]) / 2)
