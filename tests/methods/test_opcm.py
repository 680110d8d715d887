"""OPCM: whole singular value decompositions in float64, what stays closed, and lengths."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.methods import registry
from mergetool.testing.toys import assert_near, toy_models, uniform


def added(total, matrix, share):
    """The sum of all before, and what a new one has outside of it."""
    u, s, vh = torch.linalg.svd(total, full_matrices=True)
    inner = u.mT @ matrix @ vh.mT
    inner.diagonal()[: len(s)] = 0.0
    closed = int((s.cumsum(0) <= share * s.sum()).sum())
    inner[:closed, :closed] = 0.0
    return total + u @ inner @ vh


def gathered(deltas, share, matrix):
    total = deltas[0]
    for delta in deltas[1:]:
        total = added(total, delta, share) if matrix else total + delta
    return total


def mean_length(vectors):
    return sum(vector.norm() for vector in vectors) / len(vectors)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_each_model_is_merged_outside_of_the_ones_before_it(scope, share):
    base, models = toy_models("abc", exact=False)
    base, *states = ({k: v for k, v in state.items() if v.numel()} for state in (base, *models.values()))
    weights = {"a": 0.7, "b": 1.5, "c": -0.4}
    found = merge_state_dicts(
        "opcm",
        dict(zip("abc", states, strict=True)),
        base,
        share=share,
        weight=weights,
        scale=0.6,
        scope=scope,
        dtype="float64",
    )
    every = {
        name: [w * (state[name].double() - value.double()) for state, w in zip(states, weights.values(), strict=True)]
        for name, value in base.items()
    }
    total = {name: gathered(deltas, share, "proj.weight" in name) for name, deltas in every.items()}
    whole = torch.cat([value.flatten() for value in total.values()]).norm()
    flat = [torch.cat([deltas[i].flatten() for deltas in every.values()]) for i in range(3)]
    expected = {}
    for name, value in base.items():
        wide = mean_length(flat) / whole
        factor = wide if scope == "model" else mean_length(every[name]) / total[name].norm()
        expected[name] = value.double() + 0.6 * factor * total[name]
    assert_near(found, expected, tolerance=1e-6)


def test_what_is_merged_stays_on_its_own_directions():
    first, second = uniform((8, 6), "first").double(), uniform((8, 6), "second").double()
    states = {"a": {"w.weight": first}, "b": {"w.weight": second}}
    merged = merge_state_dicts("opcm", states, {"w.weight": torch.zeros_like(first)})["w.weight"]
    u, s, vh = torch.linalg.svd(first, full_matrices=False)
    along = (u.mT @ merged @ vh.mT).diagonal()
    torch.testing.assert_close(along / along[0], s / s[0])


def test_the_result_is_as_long_as_the_models_are():
    base = {"w.weight": torch.zeros(8, 6), "norm": torch.zeros(6)}
    states = {m: {"w.weight": uniform((8, 6), m), "norm": uniform((6,), m)} for m in "abcd"}
    merged = merge_state_dicts("opcm", states, base)
    lengths = [torch.cat([x.flatten() for x in state.values()]).norm() for state in (*states.values(), merged)]
    torch.testing.assert_close(lengths[-1], sum(lengths[:-1]) / 4)


def test_copies_of_one_matrix_are_that_matrix():
    states = {m: {"w.weight": uniform((8, 6), "a")} for m in "abc"}
    merged = merge_state_dicts("opcm", states, {"w.weight": torch.zeros(8, 6)})
    assert_near(merged, states["a"])


def test_a_later_model_of_low_rank_adds_its_own_directions_in_full():
    def thin(place):
        return torch.outer(torch.eye(8)[place], torch.eye(6)[place])

    states = {m: {"w.weight": thin(place)} for place, m in enumerate("ab")}
    merged = merge_state_dicts("opcm", states, {"w.weight": torch.zeros(8, 6)})["w.weight"]
    torch.testing.assert_close(merged, (thin(0) + thin(1)) / 2**0.5)


def test_where_there_is_no_whole_model_the_fix_is_told():
    method = registry()["opcm"]
    assert "write `scope: tensor`" in method().needs_weights()
    assert "write `fuse: none`" in method(fuse="qkv", scope="tensor").needs_weights()
    assert method(scope="tensor").needs_weights() is None
