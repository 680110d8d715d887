"""TIES, against the three steps written out naively in float64, and cases that can be checked by hand."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool import merge_state_dicts
from mergetool.testing.runs import cut_finely
from mergetool.testing.toys import (
    assert_near,
    assert_same_bytes,
    minus,
    plus,
    times,
    toy_base,
    toy_deltas,
    toy_models,
    uniform,
)
from tests.files import LONG

A, B = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"


def trim(delta, density, boundary):
    """Keep the `density` largest magnitudes of a vector; `boundary` says what happens to those equal to the last."""
    if density == 1.0 or delta.numel() == 0:
        return delta
    rank = max(1, int(density * delta.numel()))
    threshold = delta.abs().flatten().sort(descending=True).values[rank - 1]
    kept = delta.abs() > threshold if boundary == "drop" else delta.abs() >= threshold
    return torch.where(kept, delta, 0.0)


def elect_and_merge(deltas, weights, normalize):
    """Weigh, elect the sign of every entry, merge the values that have it."""
    weighted = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    sign = weighted.sum(0).sign()
    agree = (weighted.sign() == sign) & (sign != 0)
    total = torch.where(agree, weighted, 0.0).sum(0)
    shape = (-1, *([1] * deltas[0].ndim))
    count = torch.where(agree, torch.tensor(weights, dtype=torch.float64).reshape(shape), 0.0).sum(0)
    return total / torch.where(count == 0, 1.0, count) if normalize else total


def ties(base, models, *, density, weights, scale=1.0, scope="tensor", boundary="keep", normalize=True):
    """The method in float64, one whole model after the other."""
    deltas = [{name: m[name].double() - value.double() for name, value in base.items()} for m in models]
    if scope == "model":
        flat = [torch.cat([value.flatten() for value in delta.values()]) for delta in deltas]
        flat = [trim(x, d, boundary) for x, d in zip(flat, density, strict=True)]
        sizes = [value.numel() for value in base.values()]
        deltas = [{n: part.reshape(base[n].shape) for n, part in zip(base, x.split(sizes), strict=True)} for x in flat]
    else:
        deltas = [{n: trim(v, d, boundary) for n, v in x.items()} for x, d in zip(deltas, density, strict=True)]
    return {
        name: value.double() + scale * elect_and_merge([delta[name] for delta in deltas], weights, normalize)
        for name, value in base.items()
    }


def by_name(values):
    return dict(zip("abc", values, strict=True))


WAYS = list(product(["tensor", "model"], ["keep", "drop"], [True, False], [True, False]))
"""In the suite half of them, in which every two choices meet."""


@pytest.mark.parametrize(
    ("scope", "boundary", "normalize", "exact"),
    [way for place, way in enumerate(WAYS) if LONG or not place.bit_count() % 2],
)
@pytest.mark.parametrize(
    ("density", "weights"),
    [((0.2, 0.2, 0.2), (1.0, 1.0, 1.0)), ((0.5, 0.1, 1.0), (0.5, 2.0, 1.0)), ((0.3, 0.6, 0.9), (1.0, -0.5, 0.0))],
)
def test_the_result_is_that_of_the_three_steps_in_float64(scope, boundary, normalize, density, weights, exact):
    base, models = toy_models(exact=exact)
    options = {"scale": 0.7, "scope": scope, "boundary": boundary, "normalize": normalize}
    merged = merge_state_dicts("ties", models, base, density=by_name(density), weight=by_name(weights), **options)
    assert_near(merged, ties(base, models.values(), density=density, weights=weights, **options), tolerance=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_small_vectors_give_what_the_three_steps_give(data):
    """Small whole numbers: ties at the threshold, votes that cancel, and zeros are everywhere."""
    size = data.draw(st.integers(1, 12))
    vector = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    models = [{"w": torch.tensor(data.draw(vector), dtype=torch.float32)} for _ in range(data.draw(st.integers(1, 3)))]
    density = [data.draw(st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0])) for _ in models]
    weights = [data.draw(st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0])) for _ in models]
    options = {
        "scope": data.draw(st.sampled_from(["tensor", "model"])),
        "boundary": data.draw(st.sampled_from(["keep", "drop"])),
        "normalize": data.draw(st.booleans()),
    }
    base = {"w": torch.zeros(size)}
    names = [f"m{index}" for index in range(len(models))]
    settings_by_name = {
        "density": dict(zip(names, density, strict=True)),
        "weight": dict(zip(names, weights, strict=True)),
    }
    merged = merge_state_dicts("ties", dict(zip(names, models, strict=True)), base, **settings_by_name, **options)
    assert_near(merged, ties(base, models, density=density, weights=weights, **options), tolerance=1e-6)


def test_everything_kept_of_one_model_is_that_model():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("ties", models, base, density=1.0), models["a"])


def test_part_of_one_model_is_its_largest_changes_unscaled():
    base, tuned = torch.zeros(10), torch.tensor([0.1, -5.0, 0.3, 0.0, 4.0, -0.2, 0.6, 0.5, -0.7, 0.4])
    merged = merge_state_dicts("ties", [{"w": tuned}], {"w": base}, density=0.3)["w"]
    assert merged.tolist() == torch.tensor([0, -5.0, 0, 0, 4.0, 0, 0, 0, -0.7, 0]).tolist()


def test_of_two_opposite_changes_the_larger_wins_alone():
    one, two = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([-1.0, 4.0, 2.0])
    merged = merge_state_dicts("ties", [{"w": one}, {"w": two}], {"w": torch.zeros(3)}, density=1.0)["w"]
    assert merged.tolist() == [3.0, 4.0, 2.0]


def test_the_majority_is_one_of_magnitude_not_of_heads():
    values = [torch.tensor([x]) for x in (-1.0, -1.0, 3.0)]
    merged = merge_state_dicts("ties", [{"w": v} for v in values], {"w": torch.zeros(1)}, density=1.0)["w"]
    assert merged.tolist() == [3.0]


def test_weights_count_in_the_vote_and_in_the_mean():
    models = {"a": {"w": torch.tensor([1.0, 1.0])}, "b": {"w": torch.tensor([-2.0, 4.0])}}
    merged = merge_state_dicts("ties", models, {"w": torch.zeros(2)}, density=1.0, weight={"a": 3.0, "b": 1.0})["w"]
    assert merged.tolist() == [1.0, (3 * 1.0 + 4.0) / 4]


def test_where_changes_cancel_exactly_the_base_stays():
    base, delta = toy_base(), toy_deltas("a")
    opposite = [plus(base, delta), minus(base, delta)]
    assert_same_bytes(merge_state_dicts("ties", opposite, base, density=1.0), base)


def test_zeros_do_not_dilute_the_mean():
    models = [{"w": torch.tensor([6.0, 0.0])}, {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([2.0, 9.0])}]
    merged = merge_state_dicts("ties", models, {"w": torch.zeros(2)}, density=1.0)["w"]
    assert merged.tolist() == [4.0, 9.0]


def test_one_threshold_for_the_whole_model_is_not_one_per_tensor():
    base = {A: torch.zeros(100), B: torch.zeros(100)}
    tuned = {A: torch.arange(1.0, 101.0), B: torch.arange(1.0, 101.0) / 1000}
    per_tensor = merge_state_dicts("ties", [tuned], base, density=0.5)
    per_model = merge_state_dicts("ties", [tuned], base, density=0.5, scope="model")
    assert [int((per_tensor[name] != 0).sum()) for name in (A, B)] == [50, 50]
    assert [int((per_model[name] != 0).sum()) for name in (A, B)] == [100, 0]


def test_the_share_kept_is_exact_where_magnitudes_differ():
    delta = torch.arange(1.0, 1001.0) * (torch.arange(1000) % 2 * 2 - 1)
    for density in (0.001, 0.05, 0.2, 0.5, 0.999):
        merged = merge_state_dicts("ties", [{"w": delta}], {"w": torch.zeros(1000)}, density=density)["w"]
        assert int((merged != 0).sum()) == round(density * 1000)
        assert merged.abs().max() == 1000


def tied_models():
    """(base, model) whose differences, as those of 16-bit models do, take few values many times over."""
    base = uniform((40_000,), "base").bfloat16().float()
    return {"w": base}, {"w": (base + uniform((40_000,), "delta") / 64).bfloat16().float()}


def test_the_boundary_says_what_happens_to_entries_at_the_threshold():
    base, tuned = tied_models()
    delta = (tuned["w"] - base["w"]).abs()
    rank = 8_000
    threshold = delta.sort(descending=True).values[rank - 1]
    above, equal = int((delta > threshold).sum()), int((delta == threshold).sum())
    assert equal > 1_000
    kept = {}
    for boundary in ("keep", "drop", "random"):
        merged = merge_state_dicts("ties", [tuned], base, density=0.2, boundary=boundary)
        kept[boundary] = merged["w"] != base["w"]
    assert int(kept["keep"].sum()) == above + equal
    assert int(kept["drop"].sum()) == above
    share = (rank - above) / equal
    assert abs(int(kept["random"].sum()) - rank) < 4 * math.sqrt(equal * share * (1 - share))
    assert bool((kept["drop"] <= kept["random"]).all())
    assert bool((kept["random"] <= kept["keep"]).all())


def test_random_choices_at_the_boundary_are_the_models_own():
    base, tuned = tied_models()
    kept = {name: merge_state_dicts("ties", {name: tuned}, base, density=0.2, boundary="random")["w"] for name in "ab"}
    assert not kept["a"].equal(kept["b"])


def test_a_boundary_that_needs_no_draw_is_kept_whole():
    delta = torch.tensor([3.0, 2.0, 2.0, 1.0])
    merged = merge_state_dicts("ties", [{"w": delta}], {"w": torch.zeros(4)}, density=0.75, boundary="random")["w"]
    assert merged.tolist() == [3.0, 2.0, 2.0, 0.0]


def test_a_sum_can_be_asked_for_instead_of_the_mean():
    models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, -2.0])}]
    merged = merge_state_dicts("ties", models, {"w": torch.zeros(2)}, density=1.0, normalize=False)["w"]
    assert merged.tolist() == [4.0, -2.0]


def test_scale_multiplies_the_change():
    base, models = toy_models()
    change = minus(merge_state_dicts("ties", models, base), base)
    assert_near(merge_state_dicts("ties", models, base, scale=0.5), plus(base, times(change, 0.5)), tolerance=1e-6)


def test_density_can_change_with_depth():
    base = {A: torch.zeros(100), B: torch.zeros(100)}
    tuned = {name: torch.arange(1.0, 101.0) for name in base}
    merged = merge_state_dicts("ties", [tuned], base, density={"gradient": [0.1, 0.9]})
    assert [int((merged[name] != 0).sum()) for name in (A, B)] == [10, 90]


def test_at_least_one_entry_is_kept():
    merged = merge_state_dicts("ties", [{"w": torch.tensor([1.0, -2.0])}], {"w": torch.zeros(2)}, density=0.001)["w"]
    assert merged.tolist() == [0.0, -2.0]


def test_float64_models_are_trimmed_by_their_last_bits():
    delta = 1.0 + torch.arange(8, dtype=torch.float64) * 2**-50
    merged = merge_state_dicts("ties", [{"w": delta}], {"w": torch.zeros(8, dtype=torch.float64)}, density=0.25)["w"]
    assert merged.tolist() == [0.0] * 6 + delta[6:].tolist()


@pytest.fixture
def finely(monkeypatch):
    """Tensors of a sixteenth of the size get a sample first, and several units of work."""
    monkeypatch.setattr("mergetool.methods.families.ranks._LARGE", 1 << 14)
    monkeypatch.setattr("mergetool.engine.worker._RUN", 1 << 10)
    with cut_finely(1 << 14, 1 << 18):
        yield


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("order", ["mixed", "rising", "falling"])
def test_large_tensors_are_trimmed_exactly_whatever_a_sample_of_them_shows(scope, order, finely):
    base = {A: torch.zeros(540, 500), B: torch.zeros(50, 400)}
    models = []
    for seed in "ab":
        model = {name: uniform(tuple(value.shape), f"{seed} {name}") for name, value in base.items()}
        if order != "mixed":  # a sample of runs from the front of every block then sees too little or too much
            for block in model[A].view(-1).split(1 << 14):
                block.copy_(block[block.abs().argsort(descending=order == "falling")])
        models.append(model)
    settings = {"density": 0.3, "weight": {"a": 1.0, "b": -0.5}, "scope": scope}
    merged = merge_state_dicts({"method": "ties", **settings}, dict(zip("ab", models, strict=True)), base)
    expected = ties(base, models, density=(0.3, 0.3), weights=(1.0, -0.5), scope=scope)
    assert_near(merged, expected, 1e-6)
