"""wudi and swudi against numbers of independent float64 code, naive versions, and what must hold whatever the input."""

import numpy as np
import pytest
import torch

from mergetool.api import merge_state_dicts
from mergetool.kernels.low_rank import Pair
from mergetool.methods import registry
from mergetool.methods.families.low_rank import Products, merged_products
from tests.methods.test_dc_merge import SETS, drawn

NORMS = {
    "actmat": (0.9108534148, 4.5407033474, 0.9292387945, 4.1849647290),
    "wudi": (0.9104417779, 4.6257343708, 0.9171598569, 4.2558670897),
    "swudi": (0.8643709000, 2.8317982093, 1.0375202734, 4.0012858959),
}
"""Frobenius norms of the merged task vector, for the sets in their order."""
SETTINGS = {
    "actmat": {"method": "wudi", "normalize": False, "ridge": 0.0},
    "wudi": {"method": "wudi", "ridge": 1e-8},
    "swudi": {"method": "swudi"},
}


def update(deltas, **settings):
    deltas = [torch.as_tensor(delta) for delta in deltas]
    models = [{"mlp.weight": delta} for delta in deltas]
    base = {"mlp.weight": torch.zeros_like(deltas[0])}
    return merge_state_dicts(settings, models, base, dtype="float64")["mlp.weight"]


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("name", SETS)
def test_it_gives_the_numbers_of_others(case, name):
    found = float(update(SETS[name], **SETTINGS[case]).norm())
    assert found == pytest.approx(NORMS[case]["ABCD".index(name)], rel=1e-9)


def test_no_other_merge_disturbs_tasks_less():
    deltas = [torch.as_tensor(delta) for delta in SETS["A"]]
    best = update(deltas, method="wudi", ridge=0.0)

    def disturbance(merged):
        return sum(float(((merged - delta) @ delta.mT).square().sum() / delta.square().sum()) for delta in deltas)

    for seed in range(3):
        other = best + 0.01 * torch.as_tensor(drawn(seed, *best.shape))
        assert disturbance(best) < disturbance(other)
    assert disturbance(best) < disturbance(sum(deltas))


@pytest.mark.parametrize("case", NORMS)
def test_inputs_that_are_strangers_are_merged_without_disturbance(case):
    deltas = [np.zeros((12, 8)) for _ in range(3)]
    for t, delta in enumerate(deltas):
        delta[:, 2 * t : 2 * t + 2] = drawn(t, 12, 2)
    found = update(deltas, **SETTINGS[case])
    torch.testing.assert_close(found, torch.as_tensor(sum(deltas)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", NORMS)
def test_adapters_merge_in_core_space_as_their_products_do(case):
    pairs = [Pair(*(torch.as_tensor(x) for x in (drawn(600 + t, 10, 2), drawn(700 + t, 2, 9) / 10))) for t in range(3)]
    settings = dict(SETTINGS[case])
    kind = registry()[settings.pop("method")](**settings)
    found = Products("mlp.weight", (10, 9), ("a", "b", "c"), pairs)
    merged, _ = merged_products(kind, found, kind.params(0.0, found.names), None)
    whole = update([pair.dense() for pair in pairs], **SETTINGS[case])
    torch.testing.assert_close(merged.dense(), whole, rtol=1e-6, atol=1e-7)


def test_a_model_without_change_disturbs_nobody():
    for case in NORMS.keys() - {"swudi"}:
        found = update([*SETS["A"], np.zeros((12, 8))], **SETTINGS[case])
        torch.testing.assert_close(found, update(SETS["A"], **SETTINGS[case]), rtol=1e-6, atol=1e-7)
