"""FR-Merging: which waves go, against whole complex transforms in float64, and waves that can be seen."""

import math

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models, uniform

SHAPES = [(6, 6), (7, 7), (12, 5), (1, 9), (1, 1)]


def paper(x, cutoff):
    rows, columns = (torch.fft.fftfreq(size).double().abs() * 2 for size in x.shape)
    axes = sum(size > 1 for size in x.shape) or 1
    frequency = ((rows[:, None] ** 2 + columns**2) / axes).sqrt()
    kept = frequency >= cutoff if x.numel() > 1 else torch.ones_like(x)
    return torch.fft.ifft2(torch.fft.fft2(x) * kept).real


def authors(x, cutoff):
    rows, columns = x.shape
    y, z = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    distance = ((y - rows // 2) ** 2 + (z - columns // 2) ** 2).double().sqrt()
    return torch.fft.ifft2(torch.fft.fft2(x) * (distance <= (1 - cutoff) * min(rows, columns))).real


def merged(*deltas, **settings):
    models = {f"m{i}": {"w": delta} for i, delta in enumerate(deltas)}
    return merge_state_dicts("free", models, {"w": torch.zeros_like(deltas[0])}, **settings)["w"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cutoff", [0.3, 1.0])
@pytest.mark.parametrize("variant", [paper, authors])
def test_waves_are_filtered_and_added_up(shape, cutoff, variant):
    deltas = [uniform(shape, name).double() for name in "ab"]
    found = merged(*deltas, cutoff=cutoff, variant=variant.__name__, weight={"m0": 0.7, "m1": -1.5}, scale=0.6)
    expected = 0.6 * (0.7 * variant(deltas[0], cutoff) - 1.5 * variant(deltas[1], cutoff))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_slow_wave_goes_and_a_fast_one_stays():
    places = torch.arange(32) * 2 * math.pi / 32
    slow, fast = torch.cos(places[:, None] + 2 * places), torch.cos(14 * places[:, None] + 12 * places)
    torch.testing.assert_close(merged(slow + fast, cutoff=0.2), fast, rtol=0, atol=1e-5)


def test_the_mean_goes_first():
    delta = uniform((8, 8), "delta") + 3.0
    torch.testing.assert_close(merged(delta, cutoff=1e-3), delta - delta.mean(), rtol=0, atol=1e-5)


def test_what_is_dropped_and_what_is_kept_hold_the_whole_energy():
    delta = uniform((20, 30), "delta").double()
    kept = merged(delta, cutoff=0.4)
    torch.testing.assert_close(kept.square().sum() + (delta - kept).square().sum(), delta.square().sum())


@pytest.mark.parametrize(("shape", "dropped"), [((64, 64), 0.0), ((16, 256), 0.4)])
def test_the_authors_drop_nothing_of_a_square_and_a_part_of_a_long_matrix(shape, dropped):
    delta = uniform(shape, "delta")
    share = 1 - float(merged(delta, cutoff=0.1, variant="authors").square().sum() / delta.square().sum())
    assert (share > dropped) if dropped else (abs(share) < 1e-5)


def test_with_no_cutoff_it_is_task_arithmetic_on_matrices_and_an_average_of_the_rest():
    base, models = toy_models("ab", exact=False)
    found = merge_state_dicts("free", models, base, cutoff=0.0, scale=0.6)
    weights = dict.fromkeys(models, 1.0)
    summed = merge_state_dicts("task-arithmetic", models, base, scale=0.6, weight=weights)
    averaged = merge_state_dicts("task-arithmetic", models, base, scale=0.6, normalize=True)
    matrices = {name for name in base if "proj.weight" in name}
    assert_near(found, {name: (summed if name in matrices else averaged)[name] for name in base})
