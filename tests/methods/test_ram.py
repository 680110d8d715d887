"""RAM: a change that one model has is kept in full, one that several have is averaged; RAM+ enlarges a model's own."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import toy_models


def naive(base, models, epsilon, r=0.0, alpha=0.0):
    deltas = torch.stack([model - base for model in models])
    changed = deltas.abs() > epsilon
    count = changed.sum(0)
    own, common = changed & (count == 1), changed & (count > 1)
    update = torch.zeros_like(base)
    for delta, alone, shared in zip(deltas, own, common, strict=True):
        ratio = int(shared.sum()) / int(alone.sum()) if int(alone.sum()) else 0.0
        factor = 1 + r * min(max(ratio, 0.0), alpha)
        update += factor * delta * alone + delta * shared / count.clamp(min=1)
    return base + update


@pytest.mark.parametrize("epsilon", [1e-5, 0.03, 0.05])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 3.0), (-0.5, 1.0)])
def test_it_is_the_formula(epsilon, r, alpha):
    base, models = toy_models("abc", exact=False)
    plain = merge_state_dicts("ram", models, base, epsilon=epsilon, dtype="float64")
    more = merge_state_dicts("ramplus-tl", models, base, epsilon=epsilon, r=r, alpha=alpha, dtype="float64")
    for name, value in base.items():
        given = value.double(), [models[m][name].double() for m in "abc"], epsilon
        torch.testing.assert_close(plain[name], naive(*given).float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(more[name], naive(*given, r, alpha).float(), rtol=1e-6, atol=1e-7)


def test_changes_are_counted_entry_by_entry():
    base = {"w": torch.zeros(4)}
    a, b = torch.tensor([1.0, 2.0, 0.0, 1e-6]), torch.tensor([0.0, 4.0, 0.0, 0.0])
    assert merge_state_dicts("ram", {"a": {"w": a}, "b": {"w": b}}, base)["w"].tolist() == [1.0, 3.0, 0.0, 0.0]


def test_what_is_a_models_own_grows_with_what_it_shares():
    base = {"w": torch.zeros(3)}
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0, 5.0])  # a: two in common, one alone; b: none alone
    merged = merge_state_dicts("ramplus-tl", {"a": {"w": a}, "b": {"w": b}}, base, r=0.5, alpha=1.5)["w"]
    assert merged.tolist() == [1.75, 3.0, 4.0]
    merged = merge_state_dicts("ramplus-tl", {"a": {"w": a}, "b": {"w": b}}, base, r=0.5, alpha=10.0)["w"]
    assert merged.tolist() == [2.0, 3.0, 4.0]
