"""NearSwap: small differences are taken over, large ones are followed as far as the limit."""

import pytest
import torch

from mergetool import RecipeError, merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models


def test_a_value_moves_by_the_limit_at_most():
    base, model = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.25, 0.5, 3.0, -7.0])
    merged = merge_state_dicts("nearswap", {"a": {"w": model}}, {"w": base}, t=0.5, limit="absolute")
    assert merged["w"].tolist() == [1.0, 1.25, 0.5, 1.5, 0.5]


def test_the_limit_counts_in_mean_changes_of_the_tensor():
    base, model = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, -10.0])  # 4 in the mean
    for t, expected in ((0.25, [1.0, -1.0, 1.0, -1.0]), (1.0, [1.0, -2.0, 3.0, -4.0])):
        assert merge_state_dicts("nearswap", {"a": {"w": model}}, {"w": base}, t=t)["w"].tolist() == expected


@pytest.mark.parametrize("t", [1e-3, 0.02, 1.0])
def test_it_is_the_published_weight(t):
    """`w = t / |difference|`, at most 1, on the model."""
    base, models = toy_models("a", exact=False)
    expected = {}
    for name, value in base.items():
        a, b = value.double(), models["a"][name].double()
        weight = (t / (a - b).abs().clamp(min=1e-12)).clamp(max=1)
        expected[name] = weight * b + (1 - weight) * a
    assert_near(merge_state_dicts("nearswap", models, base, t=t, limit="absolute"), expected, tolerance=1e-6)


def test_a_limit_of_zero_is_the_base():
    base, models = toy_models("a")
    assert_near(merge_state_dicts("nearswap", models, base, t=0.0), base)


def test_limits_are_not_negative():
    base, models = toy_models("a")
    with pytest.raises(RecipeError, match="greater than or equal to 0"):
        merge_state_dicts("nearswap", models, base, t=-0.3)
