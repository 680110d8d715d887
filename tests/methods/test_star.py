"""star on spectra that can be checked by hand, and what must hold whatever the input."""

import numpy as np
import pytest
import torch

from mergetool.api import merge_state_dicts
from tests.methods.test_dc_merge import SETS, drawn
from tests.methods.test_wudi import update


def with_spectrum(*values, seed=0):
    left, right = (np.linalg.qr(drawn(seed + i, 6, 6))[0] for i in range(2))
    return left @ np.diag([*values, *[0.0] * (6 - len(values))]) @ right


@pytest.mark.parametrize(
    ("share", "expected"), [(0.4, [10.0]), (0.5, [10.0]), (0.6, [6.25, 3.75]), (0.95, [5.0, 3.0, 2.0])]
)
def test_what_is_kept_has_the_nuclear_norm_of_all(share, expected):
    found = torch.linalg.svdvals(update([with_spectrum(5.0, 3.0, 2.0)], method="star", share=share))
    torch.testing.assert_close(found[: len(expected)], torch.tensor(expected, dtype=torch.float64))
    assert float(found[len(expected) :].abs().max()) < 1e-9


def test_float32_takes_a_shorter_way_to_the_same():
    exact = update(SETS["A"], method="star")
    models = [{"mlp.weight": torch.as_tensor(delta).float()} for delta in SETS["A"]]
    found = merge_state_dicts("star", models, {"mlp.weight": torch.zeros(12, 8)})["mlp.weight"]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_task_vectors_are_averaged():
    parts = [update([delta], method="star") for delta in SETS["A"]]
    torch.testing.assert_close(update(SETS["A"], method="star"), sum(parts) / 3)
    plain = update(SETS["A"], method="star", share=1.0)
    torch.testing.assert_close(plain, torch.as_tensor(sum(SETS["A"])) / 3)


def test_turning_features_turns_the_merge():
    left, right = np.linalg.qr(drawn(7, 12, 12))[0], np.linalg.qr(drawn(8, 8, 8))[0]
    found = update([left @ delta @ right for delta in SETS["A"]], method="star")
    torch.testing.assert_close(found, torch.as_tensor(left) @ update(SETS["A"], method="star") @ torch.as_tensor(right))
