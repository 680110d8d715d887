"""Arrow's prototypes and shares, against what a naive float64 reading of the paper says."""

import math

import pytest
import torch

from mergetool.kernels.arrow import mean_similarity, prototypes, shares, similarities
from mergetool.kernels.low_rank import Pair, triplets


def product(rank, rows=9, columns=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)


def test_the_prototype_of_rank_one_is_the_row_of_a():
    b, a = product(1)
    basis = triplets(Pair(b, a)).v.mT
    torch.testing.assert_close(prototypes([basis])[0].abs(), (a[0] / a[0].norm()).double().abs(), rtol=0, atol=1e-7)


def test_prototypes_do_not_change_where_b_and_a_share_their_length_otherwise():
    b, a = product(3)
    plain, scaled = (prototypes([triplets(Pair(*halves)).v.mT]) for halves in ((b, a), (b * 8, a / 2)))
    torch.testing.assert_close(plain.abs(), scaled.abs(), rtol=0, atol=1e-6)


def test_signs_do_not_matter():
    x, v = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.equal(similarities(x, v), similarities(x, -v))
    assert torch.equal(similarities(x, v), similarities(-x, v))


def test_an_expert_that_changed_nothing_is_similar_to_nothing():
    found = prototypes([torch.eye(3), torch.zeros(0, 3)])
    assert found.tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0), (9, 1.0)])
def test_shares_are_a_softmax_of_the_largest(top_k, temperature):
    sims = torch.tensor([[0.3, 2.0, 1.1], [5.0, 0.1, 4.0]], dtype=torch.float64)
    for row, found in zip(sims.tolist(), shares(sims, temperature, top_k).tolist(), strict=True):
        kept = sorted(range(3), key=lambda task: -row[task])[:top_k]
        powers = {task: math.exp(row[task] / temperature) for task in kept}
        expected = [powers.get(task, 0.0) / sum(powers.values()) for task in range(3)]
        assert found == pytest.approx(expected, abs=1e-12)


def test_the_mean_over_matrices_does_not_depend_on_the_length_of_features():
    z, other, v, w = torch.randn(4, 7), torch.randn(4, 5), torch.randn(3, 7), torch.randn(3, 5)
    expected = mean_similarity([z, other], [v, w])
    torch.testing.assert_close(mean_similarity([100 * z, other / 7], [v, w]), expected)
    ones = similarities(z / z.square().mean(1, keepdim=True).sqrt(), v)
    torch.testing.assert_close(mean_similarity([z], [v]), ones)
