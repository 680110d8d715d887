"""SCE, step by step in float64, and the corners of each step."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models, uniform


def naive(base, models, density, select, negligible=0.0):
    deltas = torch.stack([(model - base).flatten() for model in models])
    variance = deltas.var(0, unbiased=False)
    kept = torch.ones_like(variance, dtype=torch.bool)
    if density < 1.0:
        differing = int((variance != 0).sum())
        rank = max(1, int(density * differing))
        threshold = variance.sort(descending=True).values[rank - 1] if differing else float("inf")
        kept = variance >= threshold
    selected = deltas * kept
    energies = selected.square().mean(1)
    total = float(energies.sum())
    weights = (
        torch.full_like(energies, 1 / len(energies)) if total in (0.0,) or total < negligible else energies / total
    )
    merged = selected if select == "delta" else deltas
    agree = (merged.sign() == merged.sum(0).sign()) & (merged != 0)
    count = (weights[:, None] * agree).sum(0)
    return base + ((weights[:, None] * merged * agree).sum(0) / torch.where(count == 0, 1.0, count)).view(base.shape)


@pytest.mark.parametrize("select", ["delta", "weights"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("negligible", [0.0, 1.0])
def test_it_is_the_three_steps(select, density, negligible):
    base, models = toy_models("abc", exact=False)
    models["c"] = {name: base[name] + 3 * (value - base[name]) for name, value in models["c"].items()}
    merged = merge_state_dicts(
        "sce", models, base, density=density, select=select, negligible=negligible, dtype="float64"
    )
    for name, value in base.items():
        if value.numel():
            expected = naive(value.double(), [models[m][name].double() for m in "abc"], density, select, negligible)
            torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_a_model_with_twice_the_changes_weighs_four_times_as_much():
    base = {"w": torch.zeros(1000)}
    a = uniform((1000,), "a").abs()
    models = {"a": {"w": a}, "b": {"w": 2 * a}}
    torch.testing.assert_close(merge_state_dicts("sce", models, base, density=1.0)["w"], (0.2 + 0.8 * 2) * a)


def test_small_changes_weigh_as_much_as_they_should_unless_they_are_called_negligible():
    base = {"w": torch.zeros(1000)}
    a = 1e-5 * uniform((1000,), "a").abs()
    models = {"a": {"w": a}, "b": {"w": 3 * a}}
    torch.testing.assert_close(merge_state_dicts("sce", models, base, density=1.0)["w"], (0.1 + 0.9 * 3) * a)
    equal = merge_state_dicts("sce", models, base, density=1.0, negligible=1e-6)["w"]
    torch.testing.assert_close(equal, 2 * a)


def test_what_does_not_differ_between_models_is_not_selected():
    base = {"w": torch.zeros(4)}
    models = {"a": {"w": torch.tensor([5.0, 1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([5.0, 2.0, 0.0, 4.0])}}
    merged = merge_state_dicts("sce", models, base, density=0.5)["w"]
    assert merged[:3].tolist() == [0.0, 0.0, 0.0]
    assert merged[3] > 0


@pytest.mark.parametrize("select", ["delta", "weights"])
def test_where_no_entry_differs_nothing_is_selected(select):
    base, models = toy_models("a")
    copies = dict.fromkeys("ab", models["a"])
    merged = merge_state_dicts("sce", copies, base, density=0.5, select=select)
    assert_near(merged, base if select == "delta" else models["a"])


def test_a_large_tensor_is_cut_by_a_sample_just_as_exactly():
    base = torch.zeros(600, 500)
    models = [uniform((600, 500), name) for name in "ab"]
    merged = merge_state_dicts(
        "sce", dict(zip("ab", ({"w": m} for m in models), strict=True)), {"w": base}, density=0.2
    )
    expected = naive(base.double(), [m.double() for m in models], 0.2, "delta")
    torch.testing.assert_close(merged["w"], expected.float(), rtol=1e-5, atol=1e-6)


def test_everything_selected_of_one_model_is_that_model():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("sce", models, base, density=1.0), models["a"])
