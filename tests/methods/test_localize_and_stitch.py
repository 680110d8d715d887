"""Localize-and-Stitch: the largest of a whole model, averaged where they meet, against sorting in float64."""

import torch

from mergetool import merge_state_dicts
from mergetool.methods import registry
from mergetool.testing.toys import assert_near, assert_same_bytes, toy_models


def localized(deltas, density):
    """Each tensor of a task vector, without what is not among the largest of all."""
    every = torch.cat([delta.abs().flatten() for delta in deltas.values()])
    threshold = every.sort(descending=True).values[max(1, int(density * every.numel())) - 1]
    return {name: torch.where(delta.abs() >= threshold, delta, 0.0) for name, delta in deltas.items()}


def stitched(parts, weights):
    total = sum(w * part for w, part in zip(weights, parts, strict=True))
    count = sum(w * (part != 0) for w, part in zip(weights, parts, strict=True))
    return torch.where(count > 0, total / count, 0.0)


def merged(*deltas, **settings):
    models = {f"m{i}": {"w": torch.tensor(delta)} for i, delta in enumerate(deltas)}
    return merge_state_dicts("localize-and-stitch", models, {"w": torch.zeros(len(deltas[0]))}, **settings)["w"]


def test_it_is_the_mean_of_the_largest_of_every_model():
    base, models = toy_models("abc", exact=False)
    density, weights = {"a": 0.5, "b": 0.02, "c": 1.0}, {"a": 0.7, "b": 1.5, "c": 0.4}
    found = merge_state_dicts("localize-and-stitch", models, base, density=density, weight=weights, scale=0.6)
    parts = [
        localized({k: models[m][k].double() - v.double() for k, v in base.items()}, share)
        for m, share in density.items()
    ]
    expected = {
        name: value.double() + 0.6 * stitched([part[name] for part in parts], weights.values())
        for name, value in base.items()
    }
    assert_near(found, expected, tolerance=1e-6)


def test_layers_that_changed_more_keep_more():
    base = {"small": torch.zeros(50), "large": torch.zeros(50)}
    models = {"a": {"small": torch.linspace(0.1, 1.0, 50), "large": torch.linspace(1.1, 2.0, 50)}}
    found = merge_state_dicts("localize-and-stitch", models, base, density=0.4)
    assert [int((found[name] != 0).sum()) for name in ("small", "large")] == [0, 40]
    found = merge_state_dicts("localize-and-stitch", models, base, density=0.4, scope="tensor")
    assert [int((found[name] != 0).sum()) for name in ("small", "large")] == [20, 20]


def test_masks_that_do_not_meet_add_up_and_those_that_do_are_averaged():
    deltas = [4.0, 0.1, 2.0, 0.0], [0.1, 6.0, 4.0, 0.0]
    assert merged(*deltas, density=0.5).tolist() == [4.0, 6.0, 3.0, 0.0]
    assert merged(*deltas, density=0.5, normalize=False).tolist() == [4.0, 6.0, 6.0, 0.0]


def test_everything_kept_of_one_model_is_that_model():
    base, models = toy_models("a")
    assert_same_bytes(merge_state_dicts("localize-and-stitch", models, base, density=1.0), models["a"])


def test_where_there_is_no_whole_model_the_fix_is_told():
    method = registry()["localize-and-stitch"]
    assert "write `scope: tensor`" in method().needs_weights()
    assert method(scope="tensor").needs_weights() is None
