"""dc-merge against numbers of independent float64 code, a naive version, and what must hold whatever the input."""

import numpy as np
import pytest
import torch

from mergetool.api import merge_state_dicts
from mergetool.kernels.directions import smoothed


def drawn(seed, *shape):
    return np.random.RandomState(seed).randn(*shape)


def planted(t):
    common = drawn(7, 8, 1) @ drawn(8, 1, 12) / 20
    return drawn(200 + t, 8, 2) @ drawn(300 + t, 2, 12) / 10 + drawn(400 + t, 8, 12) / 50 + common


SETS = {
    "A": [drawn(100 + t, 12, 8) / 10 for t in range(3)],
    "B": [planted(t) for t in range(3)],
    "C": [drawn(500 + t, 9, 10) / 10 for t in range(4)],
    "D": [drawn(800 + t, 16, 2) @ drawn(900 + t, 2, 10) / 8 + drawn(950 + t, 16, 10) / 20 for t in range(2)],
}
NORMS = {
    "none": (0.5661664510, 0.9526061200, 0.4757596394, 2.0210900642),
    "sparse": (1.1238023039, 1.8532884982, 1.0506834766, 3.2689645560),
    "average": (0.5578486545, 0.8984378587, 0.4746556125, 1.8880752267),
    "sum": (1.1335986550, 2.1036012020, 1.1266433610, 3.2915488325),
}
"""Frobenius norms of the merged task vector, for the sets in their order."""


def update(deltas, scale=1.0, **fields):
    deltas = [torch.as_tensor(delta) for delta in deltas]
    base = {"mlp.weight": torch.zeros_like(deltas[0])}
    models = [{"mlp.weight": delta} for delta in deltas]
    return merge_state_dicts("dc-merge", models, base, dtype="float64", scale=scale, **fields)["mlp.weight"]


def settings(case, name):
    density = {"sparse": 0.3 if name == "D" else 0.25}.get(case, 1.0)
    return {
        "smooth": "average" if case == "average" else "none",
        "density": density,
        "combine": "sum" if case == "sum" else "ties",
    }


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("name", SETS)
def test_it_gives_the_numbers_of_others(case, name):
    expected = NORMS[case]["ABCD".index(name)]
    assert float(update(SETS[name], **settings(case, name)).norm()) == pytest.approx(expected, rel=1e-9)


def test_linear_smoothing_gives_the_numbers_of_others():
    assert float(update(SETS["D"], smooth="linear", density=1.0).norm()) == pytest.approx(2.0688607549, rel=1e-9)


@pytest.mark.parametrize(
    ("smooth", "rho", "expected"),
    [
        ("none", 5.0, [8.0, 3.0, 1.0]),
        ("average", 5.0, [4.0, 4.0, 4.0]),
        ("linear", 3.0, [6.0, 4.0, 2.0]),
        ("linear", 99.0, [8.0 / 1.125, 4.0, 1 / 1.125]),
    ],
)
def test_spectra_are_smoothed_and_keep_their_sum(smooth, rho, expected):
    found = smoothed(torch.tensor([8.0, 3.0, 1.0], dtype=torch.float64), smooth, rho)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_every_task_keeps_at_least_an_entry_for_each_of_its_directions():
    deltas = SETS["A"]
    assert torch.equal(update(deltas, density=1e-6, smooth="none"), update(deltas, density=1 / 32, smooth="none"))


def test_tasks_that_do_not_meet_are_added_up():
    deltas = [np.zeros((12, 8)) for _ in range(3)]
    for t, delta in enumerate(deltas):
        delta[3 * t : 3 * t + 3, 2 * t : 2 * t + 2] = drawn(t, 3, 2)
    for density in (1.0, 0.001):
        found = update(deltas, smooth="none", density=density)
        torch.testing.assert_close(found, torch.as_tensor(sum(deltas)), rtol=0, atol=1e-12)


def test_low_rank_task_vectors_have_their_own_directions_smoothed_only():
    delta = drawn(1, 12, 2) @ drawn(2, 2, 8)
    found = torch.linalg.svdvals(update([delta, np.zeros((12, 8))]))
    mean = torch.linalg.svdvals(torch.as_tensor(delta))[:2].mean()
    torch.testing.assert_close(found[:2], mean.expand(2))
    assert float(found[2]) < 1e-12


def test_turning_features_turns_the_merge():
    left, right = np.linalg.qr(drawn(7, 12, 12))[0], np.linalg.qr(drawn(8, 8, 8))[0]
    found = update([left @ delta @ right for delta in SETS["A"]], density=0.2)
    torch.testing.assert_close(found, torch.as_tensor(left) @ update(SETS["A"], density=0.2) @ torch.as_tensor(right))


def test_more_models_than_directions_are_averaged():
    torch.testing.assert_close(update(SETS["A"], rank=0.1), torch.as_tensor(sum(SETS["A"])) / 3)
