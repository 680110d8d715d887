"""Multi-SLERP against its published steps in float64, and where directions cancel."""

import pytest
import torch

from mergetool import PlanError, merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models


def naive(vectors, weights):
    """As published, tangent space and all."""
    norms = [float(x.norm()) for x in vectors]
    units = [x / n if n else x for x, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if not float(mean.norm()):
        return mean
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    length = float(tangent.norm()) + 1e-12
    direction = mean * torch.tensor(length).cos() + tangent * torch.tensor(length).sin() / length
    return direction * sum(w * n for w, n in zip(weights, norms, strict=True))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.9, -0.1)])
def test_it_is_the_published_formula(with_base, normalize, weights):
    base, models = toy_models("abc", exact=False)
    by_name = dict(zip("abc", weights, strict=True))
    merged = merge_state_dicts(
        "multislerp", models, base if with_base else None, weight=by_name, normalize=normalize, dtype="float64"
    )
    shares = [w / sum(weights) for w in weights] if normalize else weights
    for name, value in base.items():
        centre = value.double() if with_base else torch.zeros_like(value).double()
        vectors = [(models[m][name].double() - centre).flatten() for m in "abc"]
        expected = centre + naive(vectors, shares).view(value.shape)
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_the_result_is_as_long_as_the_models_on_average():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    merged = merge_state_dicts("multislerp", {"a": {"w": a}, "b": {"w": b}})["w"]
    torch.testing.assert_close(merged, torch.tensor([8.0, 8.0]) / 8.0**0.5)


def test_directions_that_cancel_leave_the_straight_line():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 3.0**0.5 / 2])
    z = -x - y
    states = {name: {"w": value} for name, value in {"a": x, "b": 2 * y, "c": z}.items()}
    torch.testing.assert_close(merge_state_dicts("multislerp", states)["w"], (x + 2 * y + z) / 3)


def test_one_model_is_that_model():
    base, models = toy_models("a", exact=False)
    assert_near(merge_state_dicts("multislerp", models, base, weight=0.3), models["a"])


def test_weights_that_cancel_cannot_be_normalised():
    base, models = toy_models("ab")
    with pytest.raises(PlanError, match="add up to 0"):
        merge_state_dicts("multislerp", models, base, weight={"a": 1.0, "b": -1.0})
