"""Directions and entries: against whole decompositions and sorting, and parts that can be told apart."""

import pytest
import torch

from mergetool import merge_state_dicts
from mergetool.testing.toys import uniform


def kept(matrix, rank, density):
    """The leading directions, and the largest entries of the rest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    rest = matrix - low
    count = max(1, int(density * rest.numel()))
    threshold = rest.abs().flatten().sort(descending=True).values[count - 1]
    return low + torch.where(rest.abs() >= threshold, rest, 0.0) if density else low


def merged(*deltas, **settings):
    models = {f"m{i}": {"mlp.weight": delta} for i, delta in enumerate(deltas)}
    return merge_state_dicts("lors", models, {"mlp.weight": torch.zeros_like(deltas[0])}, **settings)["mlp.weight"]


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_directions_and_entries_are_added_up(shape, density, rank):
    deltas = [uniform(shape, name).double() for name in "ab"]
    found = merged(*deltas, rank=rank, density=density, weight={"m0": 0.7, "m1": -1.5}, scale=0.6)
    expected = 0.6 * (0.7 * kept(deltas[0], rank, density) - 1.5 * kept(deltas[1], rank, density))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_direction_and_a_single_entry_are_both_found():
    delta = torch.outer(uniform((20,), "left"), uniform((30,), "right"))
    delta[3, 4] += 0.5
    noisy = delta + 1e-3 * uniform((20, 30), "noise")
    found = merged(noisy, rank=1, density=0.01)
    assert float((found - delta).norm() / delta.norm()) < 0.05
    assert float((merged(noisy, rank=1, density=0.0) - delta).norm()) > float((found - delta).norm())


def test_every_matrix_keeps_as_many_directions_as_its_energy_needs():
    one = torch.outer(uniform((8,), "left"), uniform((9,), "right")).double()
    many = uniform((8, 9), "many").double()
    ranks = [int(torch.linalg.matrix_rank(merged(x, rank={"energy": 0.9}, density=0.0))) for x in (one, many)]
    assert ranks[0] == 1
    assert ranks[1] > 2


def test_everything_kept_is_task_arithmetic():
    delta = uniform((8, 9), "delta")
    torch.testing.assert_close(merged(delta, density=1.0), delta)


def test_too_many_models_for_directions_leave_entries():
    deltas = [uniform((2, 3), name).double() for name in "abc"]
    torch.testing.assert_close(merged(*deltas, density=0.2), sum(kept(delta, 0, 0.2) for delta in deltas))
