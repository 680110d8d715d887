import itertools
import math

import pytest
import torch

from mergetool.kernels.spectral import (
    Factors,
    concatenated,
    core,
    energy_rank,
    interference,
    live_directions,
    live_factors,
    live_factors_of,
    orthogonalised,
    polar,
    rank_limit,
    ranks_within,
    truncated_svd,
    whitener,
)
from tests.kernels.tsv_reference import reference_deltas, reference_numbers

REFERENCE = reference_numbers()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m, n, seed=0):
    return torch.linalg.qr(randn(m, n, seed=seed))[0]


def task(m, n, seed, power=0.7):
    """A matrix whose i-th singular value is i^-power."""
    r = min(m, n)
    return (orthonormal(m, r, 2 * seed) * torch.arange(1, r + 1) ** -power) @ orthonormal(n, r, 2 * seed + 1).mT


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def naive_polar(x):
    p, _, qh = torch.linalg.svd(x.double(), full_matrices=False)
    return p @ qh


def naive_merge(deltas, k):
    """The algorithm as the paper writes it, in float64."""
    parts = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]
    u = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    s = torch.cat([s[:k] for _, s, _ in parts])
    v = torch.cat([vh[:k].mT for _, _, vh in parts], 1)
    return naive_polar(u) @ torch.diag(s) @ naive_polar(v).mT


def merge(deltas, k):
    return orthogonalised(concatenated([live_factors(delta, k) for delta in deltas])).dense()


def relative(a, b):
    return float((a - b).norm() / b.norm())


SHAPES = [(48, 48), (96, 40), (40, 96)]


# One task vector


@pytest.mark.parametrize("shape", [*SHAPES, (1, 9), (9, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_truncation_is_as_good_as_that_of_a_full_svd(shape, share):
    delta = randn(*shape)
    k = max(1, int(share * min(shape)))
    factors = truncated_svd(delta, k)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(factors.s, s[:k], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(factors.u.mT @ factors.u, eye(k), rtol=0, atol=1e-10)
    torch.testing.assert_close(factors.v.mT @ factors.v, eye(k), rtol=0, atol=1e-10)
    torch.testing.assert_close(factors.dense(), (u[:, :k] * s[:k]) @ vh[:k], rtol=0, atol=1e-9)


def test_the_error_of_truncation_is_the_tail_of_the_spectrum():
    delta = task(60, 40, 0)
    tail = torch.linalg.svdvals(delta)[7:]
    assert float((truncated_svd(delta, 7).dense() - delta).norm()) == pytest.approx(float(tail.norm()), rel=1e-10)


def test_small_singular_values_are_measured_beyond_what_the_gram_matrix_resolves():
    s = torch.logspace(0, -11, 24, dtype=torch.float64)
    delta = (orthonormal(40, 24) * s) @ orthonormal(24, 24, 1).mT
    assert float(((truncated_svd(delta, 24).s - s) / s).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_rank_task_vector_keeps_its_rank(dtype):
    delta = (randn(60, 3) @ randn(3, 40, seed=1)).to(dtype)
    assert live_factors(delta, 10).rank == 3
    assert relative(live_factors(delta, 10).dense(), delta.double()) < 1e-6


def assert_factors_alike(found, expected, tolerance=1e-6):
    there = [Factors(each.u.cpu(), each.s.cpu(), each.v.cpu()) for each in found]
    for one, other in zip(there, expected, strict=True):
        assert one.rank == other.rank
        torch.testing.assert_close(one.s, other.s)
        torch.testing.assert_close(one.u, other.u, rtol=0, atol=tolerance)
        torch.testing.assert_close(one.dense(), other.dense())


def batch(shape):
    """Matrices of full and low rank, and one of zeros."""
    full, other = (task(*shape, seed).float() for seed in (1, 2))
    return [full, torch.outer(torch.arange(1.0, shape[0] + 1), torch.ones(shape[1])), torch.zeros(shape), other]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16)])
def test_matrices_of_one_shape_have_the_same_factors_together_as_apart(shape):
    deltas = batch(shape)
    assert_factors_alike(list(live_factors_of(deltas, 6, together=True)), [live_factors(delta, 6) for delta in deltas])
    with pytest.raises(ValueError, match="infinities"):
        list(live_factors_of([*deltas, torch.full(shape, torch.inf)], 6, together=True))


def test_in_float64_small_singular_values_of_a_batch_are_as_exact_as_apart():
    s = torch.logspace(0, -9, 24, dtype=torch.float64)
    deltas = [(orthonormal(40, 24, seed) * s) @ orthonormal(24, 24, 5 + seed).mT for seed in range(2)]
    for each in live_factors_of(deltas, 24, together=True):
        assert float(((each.s - s) / s).abs().max()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_finds_the_factors_of_a_batch():
    deltas = batch((40, 24))
    assert_factors_alike(list(live_factors_of([delta.cuda() for delta in deltas], 6)), list(live_factors_of(deltas, 6)))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_all_factors_of_float32_come_from_the_gram_matrix_alone(shape):
    deltas = [task(*shape, seed, power=1.5).float() for seed in range(3)]
    deltas[1] = deltas[1] @ randn(shape[1], 3).float() @ randn(3, shape[1]).float()
    for delta in deltas:
        found, expected = live_factors(delta, 24), live_factors(delta.double(), 24)
        expected = expected.live(max(shape) * torch.finfo(torch.float32).eps)
        assert_factors_alike([found], [expected])
        torch.testing.assert_close(found.u.mT @ found.u, eye(found.rank), rtol=0, atol=1e-8)
    for parts in (deltas, [delta.mT for delta in deltas]):
        beside = live_factors(torch.cat(parts, 1), min(parts[0].shape[0], 3 * parts[0].shape[1])).u
        found = live_directions(parts)
        torch.testing.assert_close((found.mT @ beside).abs(), eye(beside.shape[1]), rtol=0, atol=1e-6)


def test_a_zero_task_vector_has_rank_0():
    factors = live_factors(torch.zeros(6, 4), 2)
    assert (factors.u.shape, factors.s.shape, factors.v.shape) == ((6, 0), (0,), (4, 0))
    assert torch.equal(factors.dense(), torch.zeros(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_task_vector_that_is_not_finite_is_refused(bad):
    delta = randn(8, 5)
    delta[2, 3] = bad
    with pytest.raises(ValueError, match="infinities"):
        live_factors(delta, 2)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.99, 2), (0.99995, 3), (1.0, 3)])
def test_energy_rank_counts_squares(share, rank):
    # 64 + 36 + 0.01: shares 0.63994, 0.99990, 1
    assert energy_rank(torch.tensor([8.0, 6.0, 0.1]).double(), share) == rank


def test_ranks_within_a_budget_hold_the_most_energy_that_it_buys():
    spectra = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5.0, 1.0]), torch.tensor([1.0])]
    costs = [2, 3, 4]
    shares = [s.square() / s.square().sum() for s in spectra]
    for budget in range(9, 17):
        found = ranks_within(spectra, costs, budget)
        assert sum(k * cost for k, cost in zip(found, costs, strict=True)) <= budget
        kept = sum(float(share[:k].sum()) for share, k in zip(shares, found, strict=True))
        for ranks in itertools.product((1, 2, 3), (1, 2), (1,)):  # no other choice at this price holds more
            if sum(k * cost for k, cost in zip(ranks, costs, strict=True)) <= sum(
                k * cost for k, cost in zip(found, costs, strict=True)
            ):
                assert sum(float(share[:k].sum()) for share, k in zip(shares, ranks, strict=True)) <= kept + 1e-6
    assert ranks_within(spectra, costs, 0) == [1, 1, 1]
    assert ranks_within(spectra, costs, 99) == [3, 2, 1]
    assert ranks_within([*spectra, torch.zeros(0)], [*costs, 1], 99) == [3, 2, 1, 0]


@pytest.mark.parametrize(("rank", "limit"), [("auto", 5), (3, 3), (99, 20), (0.5, 10), ({"energy": 0.5}, 20)])
def test_a_rank_comes_to_a_number_of_directions(rank, limit):
    assert rank_limit(rank, 20, 4) == limit


def test_transposing_scaling_and_cutting_factors():
    factors = truncated_svd(randn(7, 5), 5)
    torch.testing.assert_close(factors.mT.dense(), factors.dense().mT)
    torch.testing.assert_close(factors.scaled(-2.0).dense(), -2 * factors.dense())
    assert factors.leading(2).rank == 2
    assert factors.leading(9).rank == 5
    assert factors.to(torch.float32).dense().dtype == torch.float32


# The nearest orthonormal matrix


@pytest.mark.parametrize("shape", [(50, 50), (80, 30), (30, 1)])
def test_polar_is_the_nearest_orthonormal_matrix(shape):
    x = randn(*shape)
    q = polar(x)
    torch.testing.assert_close(q, naive_polar(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(q.mT @ q, eye(shape[1]), rtol=0, atol=1e-10)
    torch.testing.assert_close(x @ whitener(x), q, rtol=0, atol=1e-10)


def test_polar_of_a_flat_matrix_has_orthonormal_rows():
    x = randn(20, 30)
    q = polar(x)
    torch.testing.assert_close(q, naive_polar(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(q @ q.mT, eye(20), rtol=0, atol=1e-10)


@pytest.mark.parametrize("smallest", [1e-3, 3e-5, 4.8e-7, 1e-7])
def test_a_direction_is_kept_however_weak_it_is_in_a_real_model(smallest):
    s = torch.linspace(1.5, 0.3, 40, dtype=torch.float64)
    s[-1] = smallest
    p, q = orthonormal(60, 40), orthonormal(40, 40, 1)
    x = (p * s) @ q.mT
    assert relative(polar(x), p @ q.mT) < 1e-7
    assert relative(x @ whitener(x), p @ q.mT) < 1e-7


def test_null_directions_are_left_out_or_filled():
    p, q = orthonormal(60, 40), orthonormal(40, 40, 1)
    s = torch.ones(40, dtype=torch.float64)
    s[30:] = 1e-14
    x = (p * s) @ q.mT
    isometry = p[:, :30] @ q[:, :30].mT
    torch.testing.assert_close(polar(x), isometry, rtol=0, atol=1e-10)
    torch.testing.assert_close(x @ whitener(x), isometry, rtol=0, atol=1e-10)
    filled = polar(x, fill=True)
    torch.testing.assert_close(filled.mT @ filled, eye(40), rtol=0, atol=1e-10)


# The merge


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.3, 0.7, 1.2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-7)])
def test_merge_agrees_with_the_paper_in_float64(shape, power, dtype, tolerance):
    deltas = [task(*shape, seed, power).to(dtype) for seed in range(4)]
    k = min(shape) // 4
    assert relative(merge(deltas, k), naive_merge(deltas, k)) < tolerance


@pytest.mark.parametrize("name", ["mlp.up", "mlp.down", "attn.out"])
def test_merge_agrees_with_the_authors_code(name):
    deltas = [each[name] for each in reference_deltas()]
    r = min(deltas[0].shape)
    torch.testing.assert_close(merge(deltas, r // 3), REFERENCE[f"merge.{name}"], rtol=0, atol=1e-10)
    for label, delta in zip("abc", deltas, strict=True):
        factors = truncated_svd(delta, r // 3)
        torch.testing.assert_close(factors.s, REFERENCE[f"sigma.{label}.{name}"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["mlp.up", "attn.out"])
def test_ablations_agree_with_the_authors_code(name):
    deltas = [each[name] for each in reference_deltas()]
    r = min(deltas[0].shape)
    kept = [truncated_svd(delta, r // 3) for delta in deltas]
    torch.testing.assert_close(concatenated(kept).dense(), REFERENCE[f"truncated_sum.{name}"], rtol=0, atol=1e-10)
    for label, factors in zip("abc", kept, strict=True):
        torch.testing.assert_close(factors.dense(), REFERENCE[f"compress.{label}.{name}"], rtol=0, atol=1e-10)
    # Untruncated, K = 3 r > m: rows become orthonormal. Their numbers are float32.
    assert relative(merge(deltas, r), REFERENCE[f"lossless.{name}"].double()) < 1e-5


def test_merge_keeps_every_singular_value():
    deltas = [task(50, 40, seed) for seed in range(3)]
    kept = torch.cat([torch.linalg.svdvals(delta)[:13] for delta in deltas])
    merged = merge(deltas, 13)
    found = torch.linalg.svdvals(merged)
    torch.testing.assert_close(found[:39], kept.sort(descending=True).values, rtol=0, atol=1e-12)
    assert float(found[39:].max()) < 1e-12
    assert float(merged.norm()) == pytest.approx(float(kept.norm()), rel=1e-12)


def test_one_task_at_full_rank_is_itself():
    delta = task(20, 30, 0)
    torch.testing.assert_close(merge([delta], 20), delta, rtol=0, atol=1e-12)


def test_merge_through_the_core_is_the_same_for_any_subset():
    factors = [live_factors(task(50, 40, seed), 10) for seed in range(4)]
    for subset in ([0], [1, 3], [0, 1, 2, 3]):
        chosen = [factors[index] for index in subset]
        every = concatenated(chosen)
        torch.testing.assert_close(
            every.u @ core(every) @ every.v.mT, orthogonalised(every).dense(), rtol=0, atol=1e-10
        )


def test_order_of_tasks_does_not_matter():
    deltas = [task(50, 40, seed) for seed in range(4)]
    assert relative(merge([deltas[i] for i in (2, 0, 3, 1)], 10), merge(deltas, 10)) < 1e-12


def test_transposing_the_tasks_transposes_the_merge():
    deltas = [task(50, 40, seed) for seed in range(4)]
    assert relative(merge([delta.mT for delta in deltas], 10).mT, merge(deltas, 10)) < 1e-12


def test_rotating_both_sides_of_the_tasks_rotates_the_merge():
    deltas = [task(50, 40, seed) for seed in range(4)]
    a, b = orthonormal(50, 50, 77), orthonormal(40, 40, 78)
    assert relative(merge([a @ delta @ b for delta in deltas], 10), a @ merge(deltas, 10) @ b) < 1e-10


def test_only_the_subspaces_of_a_task_matter():
    """Any bases of the kept subspaces, with a core that is then not diagonal, give the same merge."""
    factors = [live_factors(task(50, 40, seed), 10) for seed in range(3)]
    turns = [(orthonormal(10, 10, 50 + i), orthonormal(10, 10, 60 + i)) for i in range(3)]
    left = polar(torch.cat([each.u @ p for each, (p, _) in zip(factors, turns, strict=True)], 1))
    right = polar(torch.cat([each.v @ q for each, (_, q) in zip(factors, turns, strict=True)], 1))
    middle = torch.block_diag(*[p.mT @ torch.diag(each.s) @ q for each, (p, q) in zip(factors, turns, strict=True)])
    assert relative(left @ middle @ right.mT, orthogonalised(concatenated(factors)).dense()) < 1e-10


def test_scaling_tasks_scales_singular_values_only():
    deltas = [task(50, 40, seed) for seed in range(3)]
    factors = [live_factors(delta, 10) for delta in deltas]
    scaled = [each.scaled(c) for each, c in zip(factors, (2.0, -1.0, 0.5), strict=True)]
    expected = merge([c * delta for c, delta in zip((2.0, -1.0, 0.5), deltas, strict=True)], 10)
    assert relative(orthogonalised(concatenated(scaled)).dense(), expected) < 1e-10
    assert relative(merge([1e-6 * delta for delta in deltas], 10), 1e-6 * merge(deltas, 10)) < 1e-10


def test_tasks_on_disjoint_rows_and_columns_add_up_undisturbed():
    first, second = torch.zeros(2, 40, 30, dtype=torch.float64)
    first[:20, :15], second[20:, 15:] = randn(20, 15), randn(20, 15, seed=1)
    factors = [live_factors(first, 6), live_factors(second, 6)]
    expected = truncated_svd(first, 6).dense() + truncated_svd(second, 6).dense()
    assert relative(orthogonalised(concatenated(factors)).dense(), expected) < 1e-12
    assert interference(concatenated(factors)).total < 1e-20


# Degenerate tasks


def test_copies_of_an_expert_merge_to_its_truncation():
    delta = task(50, 40, 0)
    once = truncated_svd(delta, 13).dense()
    # Each of T identical experts brings the same triplets; U' of [U, U] is [U, U] / sqrt(2), so M = U S V^T.
    assert relative(merge([delta, delta], 13), once) < 1e-12
    assert relative(merge([delta, delta, delta], 13), once) < 1e-12


def test_almost_copies_of_an_expert_merge_to_its_truncation():
    delta = task(50, 40, 0, power=2.0)
    noise = 1e-13 * randn(50, 40, seed=5)
    assert relative(merge([delta, delta + noise], 5), truncated_svd(delta, 5).dense()) < 1e-9


def test_filling_null_directions_keeps_all_singular_values_instead():
    factors = [live_factors(task(50, 40, 0), 13)] * 2
    filled = orthogonalised(concatenated(factors), fill=True).dense()
    assert float(filled.norm()) == pytest.approx(math.sqrt(2) * float(factors[0].s.norm()), rel=1e-10)


def test_an_idle_expert_changes_nothing():
    live = [task(50, 40, seed) for seed in range(2)]
    idle = torch.zeros(50, 40, dtype=torch.float64)
    assert relative(merge([live[0], idle, live[1], idle], 10), merge(live, 10)) < 1e-12


def test_only_idle_experts_merge_to_zero():
    idle = torch.zeros(50, 40)
    merged = merge([idle, idle], 10)
    assert merged.shape == (50, 40)
    assert not merged.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_experts_merge_by_the_directions_that_they_have(dtype):
    deltas = [(randn(50, 4, seed=i) @ randn(4, 40, seed=9 + i)).to(dtype) for i in range(3)]
    assert relative(merge(deltas, 13), naive_merge(deltas, 4)) < 1e-5


def test_single_rows_merge():
    deltas = [randn(1, 9, seed=seed) for seed in range(2)]
    # r = 1: both tasks share the only left direction, U = [1, +-1], so U' shares its row between them.
    merged = merge(deltas, 1)
    assert merged.shape == (1, 9)
    assert relative(merged, naive_merge(deltas, 1)) < 1e-12


def test_two_runs_give_the_same_bits():
    deltas = [task(50, 40, 0), task(50, 40, 0), (randn(50, 4) @ randn(4, 40, seed=1))]
    assert torch.equal(merge(deltas, 13), merge(deltas, 13))


def test_arguments_are_not_touched():
    deltas = [task(50, 40, seed) for seed in range(2)]
    before = [delta.clone() for delta in deltas]
    factors = [live_factors(delta, 10) for delta in deltas]
    kept = [Factors(each.u.clone(), each.s.clone(), each.v.clone()) for each in factors]
    every = concatenated(factors)
    orthogonalised(every)
    core(every)
    interference(every)
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))
    for each, copy in zip(factors, kept, strict=True):
        assert torch.equal(each.u, copy.u)
        assert torch.equal(each.s, copy.s)
        assert torch.equal(each.v, copy.v)


# Interference


def test_interference_of_two_overlapping_directions_by_hand():
    """Left vectors at 60 degrees, right vectors at 60 degrees: both Gram matrices have 1/2 off the diagonal."""
    half = math.sqrt(3) / 2
    first = Factors(eye(2)[:, :1], torch.tensor([2.0]).double(), eye(2)[:, :1])
    turned = torch.tensor([[0.5], [half]]).double()
    second = Factors(turned, torch.tensor([4.0]).double(), turned)
    found = interference(concatenated([first, second]))
    # (U^T U - I) S (V^T V - I) = diag(s_2, s_1) / 4
    assert found.total == pytest.approx((4 + 2) / 4)
    assert found.normalised == pytest.approx(1 / 4)


def test_interference_is_0_for_one_task_and_after_orthogonalising():
    factors = [live_factors(task(50, 40, seed), 10) for seed in range(3)]
    assert interference(concatenated(factors[:1])).total < 1e-20
    assert interference(concatenated(factors)).total > 0.1
    together = orthogonalised(concatenated(factors))
    assert interference(together).total < 1e-20
    assert interference(live_factors(torch.zeros(5, 5), 2)).total == 0


def test_interference_does_not_depend_on_order_or_signs():
    factors = [live_factors(task(50, 40, seed), 10) for seed in range(3)]
    signs = torch.tensor([1.0, -1.0] * 5).double()
    flipped = [Factors(each.u * signs, each.s, each.v * signs) for each in factors]
    expected = interference(concatenated(factors))
    for other in (interference(concatenated(factors[::-1])), interference(concatenated(flipped))):
        assert other.total == pytest.approx(expected.total, rel=1e-12)
