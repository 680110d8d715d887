"""Fusion by optimal transport: planted copies, split units, other widths, and plans that can be checked by hand."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mergetool
from mergetool.errors import PlanError
from mergetool.kernels.transport import transport
from mergetool.testing.toys import assert_near
from tests.alignment import nets

BUILD = "from tests.arch.networks import MLP\n\ndef build():\n    return MLP((6, 20, 16, 4))\n"


def merge(models, architecture="mlp", **settings):
    section = {"method": "ot-fusion", **settings}
    return mergetool.merge_state_dicts(section, models, architecture=architecture, trust_code=True)


def data(folder):
    (folder / "nets.py").write_text(BUILD)
    save_file({"x": torch.randn(200, 6, generator=torch.Generator().manual_seed(0))}, folder / "x.safetensors")
    return {"by": "activations", "data": f"{folder}/x.safetensors", "network": f"{folder}/nets.py:build"}


def split(state, times):
    """The same network with each hidden unit as often as `times` says for its layer, in some order."""
    wide, shares = dict(state), {}
    for layer, counts in enumerate(times):
        units = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        units = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(layer))]
        shares[layer] = units, 1 / torch.tensor(counts, dtype=torch.float32)[units]
        for kind in ("weight", "bias"):
            wide[f"layers.{layer}.{kind}"] = wide[f"layers.{layer}.{kind}"][units]
        after = f"layers.{layer + 1}.weight"
        wide[after] = wide[after][:, units] * shares[layer][1]
    return wide


def test_copies_in_any_order_merge_to_the_first_as_by_git_rebasin(tmp_path):
    models = nets.copies(nets.mlp(), 3, architecture="mlp")
    assert_near(merge(models), models["a"], 1e-5)
    assert_near(merge(models, match=data(tmp_path) | {"compare": "product"}), models["a"], 1e-5)
    rebasin = mergetool.merge_state_dicts("git-rebasin", models, architecture="mlp")
    assert_near(merge(models), rebasin, 1e-5)


@pytest.mark.parametrize("method", ["ot-fusion", "zipit", "git-rebasin"])
def test_networks_without_biases_are_matched_up_to_the_head(method):
    plain = {name: x for name, x in nets.mlp().items() if name.endswith("weight")}
    models = nets.copies(plain, 2, architecture="mlp")
    assert_near(mergetool.merge_state_dicts(method, models, architecture="mlp"), models["a"], 1e-5)


@pytest.mark.parametrize("first", ["narrow", "wide"])
def test_units_that_were_split_in_two_are_found_together(first):
    narrow = nets.mlp()
    models = {"narrow": narrow, "wide": split(narrow, [[2] * 20, [3] * 16])}
    turned = {first: models[first], **models}
    assert_near(merge(turned), models[first], 1e-5)


def test_units_that_were_split_unevenly_are_found_by_what_reads_them():
    narrow = nets.mlp()
    models = {"narrow": narrow, "wide": split(narrow, [[1, 2, 3, 1] * 5, [1] * 16])}
    assert_near(merge(models, masses="outgoing"), narrow, 1e-5)
    assert max(float((x - narrow[name]).abs().max()) for name, x in merge(models).items()) > 0.01


def test_a_soft_plan_nears_the_exact_one():
    models = nets.copies(nets.mlp(), 2, architecture="mlp")
    assert_near(merge(models, smoothing=0.01), models["a"], 1e-3)
    assert (merge(models, smoothing=1.0)["layers.0.weight"] - models["a"]["layers.0.weight"]).norm() > 0.1


def test_networks_of_other_widths_come_to_the_shapes_of_the_first():
    models = {"a": nets.mlp(0, (6, 9, 7, 4)), "b": nets.mlp(1, (6, 20, 5, 4)), "c": nets.mlp(2, (6, 9, 7, 4))}
    assert nets.shapes_of(merge(models)) == nets.shapes_of(models["a"])


def test_plans_by_hand():
    cost = np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.5]])
    even = transport(cost, np.full(4, 0.25), np.full(2, 0.5), 0.0)
    assert (4 * even).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert transport(cost.T, np.full(2, 0.5), np.full(4, 0.25), 0.0).T.tolist() == even.tolist()
    uneven = transport(cost[:2], np.array([0.75, 0.25]), np.array([0.5, 0.5]), 0.0)
    assert np.allclose(uneven, [[0.5, 0.25], [0.0, 0.25]])
    for smoothing in (0.0, 0.1):
        plan = transport(cost[:3], np.full(3, 1 / 3), np.array([0.2, 0.8]), smoothing)
        assert np.allclose(plan.sum(1), 1 / 3)
        assert np.allclose(plan.sum(0), [0.2, 0.8])


def test_what_cannot_be_carried_is_told(tmp_path):
    with pytest.raises(PlanError, match="not in hidden units"):
        merge({"a": nets.mlp(), "b": nets.mlp(1, (6, 20, 16, 5))})
    with pytest.raises(PlanError, match="is of another width"):
        merge({"a": nets.mlp(), "b": nets.mlp(1, (6, 21, 16, 4))}, match=data(tmp_path))
    models = {"a": nets.mlp(), "b": nets.mlp(1, (6, 21, 16, 4))}
    with pytest.raises(PlanError, match=r"shape \[21, 6\]"):
        mergetool.merge_state_dicts("git-rebasin", models, architecture="mlp")
