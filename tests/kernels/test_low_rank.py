"""Pairs of thin matrices against the dense float64 matrices that they stand for."""

import pytest
import torch

from mergetool.kernels.low_rank import (
    Pair,
    concatenated,
    in_cores,
    leading,
    leading_of_rows,
    lifted,
    truncated,
)
from tests.kernels.test_spectral import orthonormal, randn, relative


def pair(m, n, r, seed=0, dtype=torch.float64):
    return Pair(randn(m, r, seed=2 * seed).to(dtype), randn(r, n, seed=2 * seed + 1).to(dtype))


def dense(each):
    return each.b.double() @ each.a.double()


def best(matrix, k):
    """Of rank k, and what it loses."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k], float(s[k:].norm() / s.norm())


def matrix(m, n, s):
    s = torch.as_tensor(s, dtype=torch.float64)
    return (orthonormal(m, len(s), 3) * s) @ orthonormal(n, len(s), 4).mT


# Sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sum_is_the_halves_side_by_side(dtype):
    pairs = [pair(12, 9, rank, rank, dtype) for rank in (2, 3, 1)]
    found = concatenated(pairs, [0.5, -2.0, 0.0])
    assert found.a.shape == (5, 9)
    torch.testing.assert_close(dense(found), 0.5 * dense(pairs[0]) - 2 * dense(pairs[1]), rtol=0, atol=1e-13)
    assert concatenated(pairs, [0.0, 0.0, 0.0]).dense().shape == (12, 9)
    assert not concatenated(pairs, [0.0, 0.0, 0.0]).dense().any()


# Cutting


@pytest.mark.parametrize(("m", "n", "r"), [(30, 20, 8), (20, 30, 8), (6, 40, 8), (40, 5, 8), (7, 7, 1)])
@pytest.mark.parametrize("keep", [1, 3, 99, None])
def test_a_cut_pair_is_the_best_of_its_rank(m, n, r, keep):
    whole = pair(m, n, r)
    found, lost = truncated(whole, keep)
    count = min(m, n, r) if keep is None else min(m, n, r, keep)
    expected, loss = best(dense(whole), count)
    assert found.b.shape == (m, count)
    torch.testing.assert_close(dense(found), expected, rtol=0, atol=1e-12)
    assert lost == pytest.approx(loss, abs=1e-12)


def test_both_halves_of_a_cut_pair_weigh_the_same_and_signs_are_fixed():
    whole = pair(30, 20, 6)
    found, _ = truncated(whole, None)
    s = torch.linalg.svdvals(dense(whole))[:6]
    torch.testing.assert_close(found.b.mT @ found.b, s.diag())
    torch.testing.assert_close(found.a @ found.a.mT, s.diag())
    turned, _ = truncated(Pair(-whole.b.flip(1), -whole.a.flip(0)), None)
    torch.testing.assert_close(turned.b, found.b)
    assert (found.b.gather(0, found.b.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.65, 2), (0.99, 2), (0.99995, 3), (1.0, 3)])
def test_a_share_of_the_energy_is_kept(share, rank):
    whole = Pair(orthonormal(9, 3) * torch.tensor([8.0, 6.0, 0.1]).double(), orthonormal(7, 3, 1).mT)
    for found, lost in (truncated(whole, share), leading(dense(whole), share)):
        assert found.b.shape[1] == rank
        assert lost == pytest.approx(best(dense(whole), rank)[1], abs=1e-12)


def test_what_is_twice_there_counts_once():
    one = pair(30, 20, 4, dtype=torch.float32)
    found, lost = truncated(concatenated([one, one, pair(30, 20, 2, 5)], [0.3, 0.7, 1.0]), None)
    assert found.b.shape[1] == 6
    assert lost == 0
    assert relative(dense(found), dense(one) + dense(pair(30, 20, 2, 5))) < 1e-14
    assert truncated(concatenated([one, one], [1.0, -1.0]), None)[0].b.shape[1] == 0


def test_nothing_stays_nothing():
    for nothing in (Pair(torch.zeros(5, 2), torch.ones(2, 4)), concatenated([pair(5, 4, 2)], [0.0])):
        found, lost = truncated(nothing, 3)
        assert (found.b.shape, found.a.shape, lost) == ((5, 0), (0, 4), 0.0)


# Cores


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("inputs", [True, False])
def test_every_matrix_is_its_core_in_the_common_bases(outputs, inputs):
    pairs = [pair(12, 15, 2, seed) for seed in range(3)]
    found = in_cores(pairs, outputs=outputs, inputs=inputs)
    assert found.cores[0].shape == (6 if outputs else 12, 6 if inputs else 15)
    for basis in (each for each in (found.outputs, found.inputs) if each is not None):
        columns = basis.times(torch.eye(6).double())
        torch.testing.assert_close(columns.mT @ columns, torch.eye(6).double())
    for each, core in zip(pairs, found.cores, strict=True):
        whole, lost = lifted(found, core, None)
        torch.testing.assert_close(dense(whole), dense(each), rtol=0, atol=1e-12)
        assert lost == 0


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("inputs", [True, False])
def test_a_lifted_core_is_cut_as_its_matrix_is(outputs, inputs):
    pairs = [pair(12, 15, 2, seed) for seed in range(3)]
    found = in_cores(pairs, outputs=outputs, inputs=inputs)
    (cut, lost), (expected, loss) = lifted(found, sum(found.cores), 2), truncated(concatenated(pairs, [1.0] * 3), 2)
    torch.testing.assert_close(cut.b, expected.b)
    torch.testing.assert_close(cut.a, expected.a)
    assert lost == pytest.approx(loss)


def test_bases_hold_no_more_than_what_is_used():
    one = pair(12, 15, 2)
    found = in_cores([one, Pair(2 * one.b, one.a), Pair(torch.zeros(12, 4), torch.ones(4, 15)), pair(12, 15, 9, 1)])
    assert found.cores[0].shape == (11, 12)  # 2 + 9, and the row of ones that nothing is made of
    assert in_cores([Pair(torch.zeros(12, 4), torch.zeros(4, 15))]).cores[0].shape == (0, 0)
    nothing, lost = lifted(in_cores([Pair(torch.zeros(12, 4), torch.zeros(4, 15))]), torch.zeros(0, 0), None)
    assert (nothing.b.shape, nothing.a.shape, lost) == ((12, 0), (0, 15), 0.0)


# Matrices that are no products

SPECTRA = {
    "steep": [2.0**-i for i in range(40)],
    "slow": [(i + 1) ** -0.3 for i in range(120)],
    "flat": [1.0] * 120,
    "two steps": [1.0 + 0.001 * i for i in range(20)] + [0.01] * 100,
    "low": [1.0, 0.5, 0.1],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
@pytest.mark.parametrize("keep", [4, 16])
def test_the_leading_part_loses_what_a_full_svd_loses(name, shape, keep):
    whole = matrix(*shape, SPECTRA[name])
    _, loss = best(whole, keep)
    for found, lost in (leading(whole, keep), leading_of_rows(lambda i, j: whole[i:j], shape, keep, rows=17)):
        assert lost == pytest.approx(loss, rel=1e-4, abs=1e-12)
        assert relative(dense(found), whole) == pytest.approx(lost, rel=1e-9, abs=1e-12)
        assert found.b.shape[1] == min(keep, len(SPECTRA[name]))


@pytest.mark.parametrize("shape", [(1100, 1200), (1200, 1100)])
def test_large_matrices_are_searched_from_their_longer_side(shape):
    s = torch.arange(1, 61) ** -0.5
    whole = matrix(*shape, s)
    found, lost = leading(whole, 8)
    assert lost == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-4)
    assert relative(dense(found), whole) == pytest.approx(lost, rel=1e-9)


@pytest.mark.parametrize("keep", [0.5, 0.9, 1.0, None])
def test_as_many_directions_are_sought_as_are_needed(keep):
    whole = matrix(300, 250, [(i + 1) ** -0.3 for i in range(230)])
    energy = torch.linalg.svdvals(whole)[:230].square()
    count = 230 if keep is None else int((energy.cumsum(0) < keep * energy.sum() * (1 - 1e-12)).sum()) + 1
    found, lost = leading_of_rows(lambda i, j: whole[i:j], whole.shape, keep, rows=100)
    assert abs(found.b.shape[1] - count) <= (keep != 1.0)
    assert lost == pytest.approx(best(whole, found.b.shape[1])[1], rel=1e-4, abs=1e-7)


def test_rows_are_read_a_few_at_a_time():
    whole, seen = matrix(64, 40, SPECTRA["steep"][:30]).float(), []

    def read(start, stop):
        seen.append((start, stop))
        return whole[start:stop].clone()

    found, _ = leading_of_rows(read, (64, 40), 8, rows=20)
    assert set(seen) == {(0, 20), (20, 40), (40, 60), (60, 64)}
    torch.testing.assert_close(dense(found), best(whole.double(), 8)[0], rtol=0, atol=1e-6)
    assert found.b.dtype == torch.float64


@pytest.mark.parametrize("keep", [2, 0.9, None])
def test_of_zeros_nothing_is_left_and_what_is_not_finite_is_refused(keep):
    for find in (leading, lambda x, keep: leading_of_rows(lambda i, j: x[i:j], x.shape, keep)):
        found, lost = find(torch.zeros(6, 4), keep)
        assert (found.b.shape, found.a.shape, lost) == ((6, 0), (0, 4), 0.0)
        with pytest.raises(ValueError, match="infinities"):
            find(torch.full((6, 4), torch.inf), keep)
