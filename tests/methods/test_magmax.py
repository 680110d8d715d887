"""The largest change of every entry, against a fold in float64, and what happens between equals."""

import pytest
import torch

from mergetool import MergeError, merge_state_dicts
from mergetool.testing.toys import assert_near, toy_models


def merged(*deltas, **settings):
    """What becomes of these task vectors."""
    models = {f"m{i}": {"w": torch.tensor(delta)} for i, delta in enumerate(deltas)}
    base = {"w": torch.zeros(len(deltas[0]))}
    return merge_state_dicts("magmax", models, base, **{"scale": 1.0, **settings})["w"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_entry_is_the_one_of_largest_magnitude(dtype):
    base, models = toy_models("abc", exact=False)
    weights = {"a": 0.7, "b": -1.5, "c": 0.4}
    found = merge_state_dicts("magmax", models, base, weight=weights, scale=0.6, dtype=dtype)
    expected = {}
    for name, value in base.items():
        deltas = torch.stack([w * (models[m][name].double() - value.double()) for m, w in weights.items()])
        expected[name] = value.double() + 0.6 * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    assert_near(found, expected, tolerance=1e-6)


def test_of_changes_equally_large_the_later_one_is_taken():
    assert merged([2.0, 1.0, 0.0], [-2.0, 0.0, 0.0], [1.0, -1.0, 0.0]) == [-2.0, -1.0, 0.0]


def test_weights_act_before_the_comparison():
    assert merged([2.0, 2.0], [3.0, 3.0], weight={"m0": 2.0, "m1": 1.0}) == [4.0, 4.0]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_larger_than_anything(place):
    deltas = [[5.0], [-6.0], [7.0]]
    deltas[place] = [float("nan")]
    with pytest.raises(MergeError, match=f"model 'm{place}'"):
        merged(*deltas)
