"""merge-many on checkpoints in planted orders, and on unrelated ones."""

import torch

import mergetool
from mergetool.testing.toys import assert_near
from tests.alignment import nets


def merge(models, **parameters):
    return mergetool.merge_state_dicts("merge-many", models, architecture="mlp", **parameters)


def test_copies_of_one_network_in_any_order_merge_to_one_of_its_orders():
    models = nets.copies(nets.mlp(widths=(8, 30, 4)), 4, architecture="mlp")
    merged = merge(models)
    for name in ("layers.0.weight", "layers.1.weight"):
        expected = models["a"][name].double().flatten().sort().values
        torch.testing.assert_close(merged[name].double().flatten().sort().values, expected, atol=1e-5, rtol=0)


def test_unrelated_models_agree_more_than_before_whatever_their_order():
    models = {"abc"[i]: nets.mlp(seed=i, widths=(6, 15, 3)) for i in range(3)}
    turned = {name: models[name] for name in "cab"}
    merged = merge(models)
    assert_near(merge(turned), merged, 1e-6)
    plain = mergetool.merge_state_dicts("linear", models)
    assert sum(float(x.square().sum()) for x in merged.values()) > 1.2 * sum(
        float(x.square().sum()) for x in plain.values()
    )
