"""knots against a naive float64 version and what must hold whatever the input."""

import pytest
import torch

from mergetool.api import merge_state_dicts


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(deltas, **fields):
    base = {"mlp.weight": torch.zeros_like(deltas[0])}
    models = [{"mlp.weight": delta} for delta in deltas]
    return merge_state_dicts("knots", models, base, dtype="float64", **fields)["mlp.weight"]


def ties(parts, density):
    """Trim, elect, mean, one entry after the other."""
    trimmed = []
    for part in parts:
        count = max(1, int(density * part.numel()))
        threshold = part.abs().flatten().sort(descending=True).values[count - 1]
        trimmed.append(torch.where(part.abs() >= threshold, part, 0.0))
    stacked = torch.stack(trimmed)
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def naive(deltas, density):
    u, s, _ = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    u = u[:, s > 1e-10 * s[0]]
    return u @ ties([u.mT @ delta for delta in deltas], density)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 10)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_it_is_ties_in_the_basis_of_all_task_vectors_side_by_side(shape, density):
    deltas = [randn(*shape, seed=seed) for seed in range(3)]
    torch.testing.assert_close(update(deltas, density=density), naive(deltas, density))
    turned = naive([delta.mT for delta in deltas], density).mT
    torch.testing.assert_close(update(deltas, density=density, stack="outputs"), turned)


def test_the_mean_does_not_depend_on_the_basis():
    deltas = [randn(12, 8, seed=seed) for seed in range(3)]
    torch.testing.assert_close(update(deltas, combine="mean"), sum(deltas) / 3)


def test_low_rank_task_vectors_are_merged_in_the_few_directions_they_use():
    deltas = [randn(40, 2, seed=seed) @ randn(2, 30, seed=5 + seed) for seed in range(3)]
    found = update(deltas, density=0.5)
    assert int((torch.linalg.svdvals(found) > 1e-10).sum()) <= 6
    torch.testing.assert_close(found, naive(deltas, 0.5))


def test_turning_outputs_turns_the_merge():
    deltas = [randn(12, 8, seed=seed) for seed in range(3)]
    turn = torch.linalg.qr(randn(12, 12, seed=7))[0]
    torch.testing.assert_close(update([turn @ delta for delta in deltas]), turn @ update(deltas))


def test_what_is_no_matrix_is_merged_by_ties_as_it_is():
    deltas = [randn(50, seed=seed) for seed in range(3)]
    torch.testing.assert_close(update(deltas, density=0.4), ties(deltas, 0.4))
