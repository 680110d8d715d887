"""Model Stock against a naive float64 version, and at its ends."""

import pytest
import torch

import mergetool
from mergetool.testing.toys import read, write

SHAPES = {"w": (6, 5), "norm": (7,), "conv": (3, 2, 2)}


def states(count, size=1.0):
    made = []
    for seed in range(count + 1):
        generator = torch.Generator().manual_seed(seed)
        made.append(
            {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        )
    base, *others = made
    common = others[0]
    tuned = [{name: base[name] + size * (common[name] + 0.7 * other[name]) for name in SHAPES} for other in others]
    return base, {f"m{place}": state for place, state in enumerate(tuned)}


def naive(base, models):
    """One vector of weights, equation by equation."""
    deltas = [(model - base).flatten() for model in models]
    cosines = [float(x @ y / (x.norm() * y.norm())) for place, x in enumerate(deltas) for y in deltas[place + 1 :]]
    cosine = max(0.0, sum(cosines) / len(cosines))
    share = len(models) * cosine / (1 + (len(models) - 1) * cosine)
    return share * sum(models) / len(models) + (1 - share) * base


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_it_is_the_formula(count, size):
    base, models = states(count, size)
    found = mergetool.merge_state_dicts("model-stock", models, base)
    for name, value in base.items():
        expected = naive(value, [model[name] for model in models.values()])
        torch.testing.assert_close(found[name] - value, expected - value, rtol=1e-7, atol=1e-12 * size)


@pytest.mark.parametrize("count", [2, 3])
def test_rows_have_angles_of_their_own(count):
    base, models = states(count)
    found = mergetool.merge_state_dicts({"method": "model-stock", "per": "row"}, models, base)
    for name, value in base.items():
        rows = value[None] if value.dim() == 1 else value
        each = [model[name][None] if value.dim() == 1 else model[name] for model in models.values()]
        expected = torch.stack([naive(row, [model[i] for model in each]) for i, row in enumerate(rows)])
        torch.testing.assert_close(found[name], expected.view_as(value), rtol=1e-12, atol=1e-12)


def test_task_vectors_that_disagree_leave_the_base():
    base, (first, *_) = states(1)[0], states(1)[1].values()
    turned = {name: 2 * base[name] - value for name, value in first.items()}
    found = mergetool.merge_state_dicts("model-stock", {"a": first, "b": turned}, base)
    for name, value in base.items():
        assert torch.equal(found[name], value)


def test_a_model_that_changed_nothing_agrees_with_nobody():
    base, models = states(2)
    found = mergetool.merge_state_dicts("model-stock", {**models, "same": base}, base)
    for name, value in base.items():
        a, b = ((model[name] - value).flatten() for model in models.values())
        cosine = float(a @ b / (a.norm() * b.norm())) / 3
        share = 3 * cosine / (1 + 2 * cosine)
        torch.testing.assert_close(found[name], value + share * (a + b).view_as(value) / 3, rtol=1e-12, atol=1e-12)


def test_without_the_clamp_task_vectors_that_disagree_lead_away_from_the_mean():
    base = {"w": torch.zeros(2)}
    models = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([-0.6, 0.8])}}  # cosine -0.6: t = -3
    found = mergetool.merge_state_dicts("model-stock", models, base, clamp=False)["w"]
    torch.testing.assert_close(found, -3 * torch.tensor([0.2, 0.4]))
    assert mergetool.merge_state_dicts("model-stock", models, base)["w"].tolist() == [0.0, 0.0]


def test_without_the_clamp_exactly_opposite_task_vectors_leave_the_base():
    base = {"w": torch.ones(2)}
    models = {"a": {"w": torch.tensor([2.0, 1.0])}, "b": {"w": torch.tensor([0.0, 1.0])}}
    assert mergetool.merge_state_dicts("model-stock", models, base, clamp=False)["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("length", [16_383, 16_384, 300_001])
def test_long_tensors_are_counted_run_by_run_and_give_the_same(length):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(length, generator=generator)}
    common = torch.randn(length, generator=generator)
    tuned = [base["w"] + 1e-3 * (common + torch.randn(length, generator=generator)) for _ in range(3)]
    found = mergetool.merge_state_dicts("model-stock", {f"m{i}": {"w": value} for i, value in enumerate(tuned)}, base)
    expected = naive(base["w"].double(), [value.double() for value in tuned])
    torch.testing.assert_close(found["w"].double(), expected, rtol=0, atol=3e-7)


def test_what_is_kept_of_a_slice_changes_no_byte(tmp_path, monkeypatch):
    states = {
        f"m{seed}": {"w": torch.randn(600, 1000, generator=torch.Generator().manual_seed(seed))} for seed in range(4)
    }
    paths = {name: str(path) for name, path in write(tmp_path, states).items()}
    recipe = {"base": paths.pop("m0"), "models": paths, "merge": {"method": "model-stock"}}
    merged = [mergetool.run(recipe, output=tmp_path / "kept", workers=1)]
    monkeypatch.setattr("mergetool.engine.stash.KEPT_BYTES", 1 << 20)  # room for the first slice only
    merged.append(mergetool.run(recipe, output=tmp_path / "read", workers=1))
    first, second = (read(result.path)["w"] for result in merged)
    assert torch.equal(first, second)
