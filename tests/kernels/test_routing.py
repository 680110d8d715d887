import itertools
import math

import pytest
import torch

from mergetool.kernels.routing import (
    coefficients,
    cosines,
    distance,
    distances,
    fit_offsets,
    mean_distance,
    select,
    without_duplicates,
)
from mergetool.kernels.spectral import concatenated, live_factors
from tests.kernels.mass_reference import reference_bases, reference_features, reference_numbers

AUTHORS = reference_numbers()
NORMS = ["likelihood", "l2", "l1", "mahalanobis"]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(k, d, seed=0):
    return torch.linalg.qr(randn(d, k, seed=seed))[0].mT


# Agreement with the authors' code


@pytest.mark.parametrize("norm", ["l2", "l1", "mahalanobis"])
@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_distances_are_the_authors(norm, num_tasks):
    found = distances(reference_features(), list(reference_bases(num_tasks)), norm)
    tolerance = 1e-6 if norm == "mahalanobis" else 1e-9  # their 0.001 is a float32
    torch.testing.assert_close(found, AUTHORS[f"distance.{norm}.{num_tasks}"], rtol=tolerance, atol=0)


@pytest.mark.parametrize("mode", ["topk", "weighted", "top1"])
@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_coefficients_and_the_tasks_chosen_are_the_authors(mode, num_tasks):
    found = coefficients(AUTHORS[f"distance.l2.{num_tasks}"], mode)
    torch.testing.assert_close(found, AUTHORS[f"coefficients.{mode}.{num_tasks}"], rtol=0, atol=1e-12)
    expected = [tuple(row.nonzero().flatten().tolist()) for row in AUTHORS[f"selected.{mode}.{num_tasks}"]]
    if mode != "weighted":  # theirs caps the number of tasks in mode topk only
        assert select(found, threshold=0.2, top_k=3) == expected


# Distances


def test_the_residual_of_the_l2_norm_is_what_projection_leaves():
    z, own = randn(5, 20), basis(6, 20, seed=1)
    expected = (z.square().sum(1) - (z @ own.mT).square().sum(1)).sqrt()
    torch.testing.assert_close(distance(z, own), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_features_in_the_span_of_a_task_go_to_that_task(norm):
    bases = [basis(5, 40, seed) for seed in range(6)]
    for task, own in enumerate(bases):
        z = randn(8, 5, seed=task) @ own + 0.02 * randn(8, 40, seed=99)
        assert distances(z, bases, norm).argmin(1).tolist() == [task] * 8


@pytest.mark.parametrize("norm", NORMS)
def test_a_task_that_changed_nothing_is_as_far_as_zero(norm):
    z, nothing = randn(3, 10), torch.zeros(0, 10, dtype=torch.float64)
    assert bool(distance(z, nothing, norm).isfinite().all())
    assert bool((distance(z, nothing, norm) > distance(z, basis(4, 10), norm)).all())


def test_every_matrix_counts_the_same_however_long_its_features_are():
    bases = [[basis(4, 12, 10 * layer + task) for task in range(3)] for layer in range(2)]
    first, second = randn(6, 12), randn(6, 12, seed=1)
    expected = mean_distance([first, second], bases)
    torch.testing.assert_close(mean_distance([1e3 * first, second], bases), expected)
    relative = [distances(z, own) / z.norm(dim=1, keepdim=True) for z, own in zip((first, second), bases, strict=True)]
    torch.testing.assert_close(expected, (relative[0] + relative[1]) / 2)


def test_one_matrix_gives_the_distance_itself():
    bases = [basis(4, 12, task) for task in range(3)]
    torch.testing.assert_close(mean_distance([randn(6, 12)], [bases]), distances(randn(6, 12), bases))


def test_features_of_zeros_are_at_distance_zero_from_everything():
    bases = [[basis(4, 12, task) for task in range(3)]] * 2
    assert not mean_distance([torch.zeros(2, 12).double()] * 2, bases).any()


# Likelihood


def test_likelihood_is_that_of_the_best_two_variances_over_that_of_the_best_single_one():
    own = basis(6, 20, seed=1)
    z = torch.cat([randn(4, 6, seed=2) @ own + 0.3 * randn(4, 20, seed=3), randn(4, 20, seed=4)])
    for row, found in zip(z, distance(z, own, "likelihood"), strict=True):
        inside = float((own @ row).square().sum())
        outside = float(row.square().sum()) - inside
        best = -3 * math.log(inside / 6) - 7 * math.log(outside / 14) - 10
        single = -10 * math.log((inside + outside) / 20) - 10
        sign = 1 if inside / 6 > outside / 14 else -1
        assert -float(found) == pytest.approx(sign * (best - single), rel=1e-9)


def test_for_tasks_of_one_rank_likelihood_is_in_the_order_of_the_residual():
    bases = [basis(5, 40, seed) for seed in range(6)]
    z = torch.cat([randn(3, 5, seed=8) @ own + 0.1 * randn(3, 40, seed=7) for own in bases])
    assert torch.equal(distances(z, bases, "likelihood").argmin(1), distances(z, bases).argmin(1))


def test_a_task_of_small_rank_is_not_drowned_by_one_that_explains_much_of_anything():
    small, large = basis(2, 40), basis(30, 40, seed=1)
    z = randn(8, 2, seed=2) @ small + 0.08 * randn(8, 40, seed=3)
    spread = randn(8, 30, seed=2) @ large
    assert distances(z, [small, large], "likelihood").argmin(1).tolist() == [0] * 8
    assert distances(spread, [small, large], "likelihood").argmin(1).tolist() == [1] * 8
    two = 3 * z / z.norm(dim=1, keepdim=True) + spread / spread.norm(dim=1, keepdim=True)
    assert distances(two, [small, large]).argmin(1).tolist() != [0] * 8
    assert distances(two, [small, large], "likelihood").argmin(1).tolist() == [0] * 8


def test_likelihood_does_not_depend_on_length_and_survives_what_is_wholly_inside():
    own = basis(4, 12)
    z = randn(6, 12)
    torch.testing.assert_close(distance(1e3 * z, own, "likelihood"), distance(z, own, "likelihood"))
    assert bool(distance(randn(3, 4) @ own, own, "likelihood").isfinite().all())
    assert bool(distance(torch.zeros(2, 12).double(), own, "likelihood").isfinite().all())
    assert not distance(z, basis(12, 12), "likelihood").any()  # a span of everything says nothing


def test_shares_of_several_matrices_are_averaged_before_they_are_judged():
    bases = [[basis(k, d, 10 * d + k) for k in (2, 4, 1)] for d in (12, 20)]
    features = [randn(6, 12), 1e3 * randn(6, 20, seed=1)]
    found = mean_distance(features, bases, "likelihood")
    for sample, task in itertools.product(range(6), range(3)):
        pairs = [(z[sample], own[task]) for z, own in zip(features, bases, strict=True)]
        e = sum(float((v @ z).square().sum() / z.square().sum()) for z, v in pairs) / 2
        q = sum(len(v) / len(z) for z, v in pairs) / 2
        nats = 8 * (q * math.log(q / e) + (1 - q) * math.log((1 - q) / (1 - e))) * (1 if e > q else -1)
        assert -float(found[sample, task]) == pytest.approx(nats, abs=1e-9)


# Coefficients


def test_one_task_gets_all():
    for mode in ("topk", "weighted", "top1"):
        assert coefficients(torch.tensor([[3.0], [0.0]]), mode).tolist() == [[1.0], [1.0]]


def test_two_tasks_get_the_same_coefficients_whatever_the_margin():
    found = coefficients(torch.tensor([[1.0, 2.0], [1.0, 1.001], [9.0, 2.0]], dtype=torch.float64))
    expected = torch.tensor([[0.804, 0.196], [0.804, 0.196], [0.196, 0.804]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_equal_distances_share_equally():
    for mode in ("topk", "weighted"):
        torch.testing.assert_close(coefficients(torch.full((1, 4), 2.0), mode), torch.full((1, 4), 0.25))


def test_a_lower_temperature_sharpens():
    drawn = randn(5, 4).abs()
    for mode in ("topk", "weighted"):
        assert bool((coefficients(drawn, mode, 0.1).amax(1) > coefficients(drawn, mode, 1.0).amax(1)).all())


# Offsets


def test_offsets_and_temperature_are_found_again():
    truth, wanted, temperature = torch.arange(3).repeat(400), torch.tensor([0.4, -0.1, -0.3]).double(), 0.5
    gumbel = -torch.log(-torch.log(torch.rand(1200, 3, generator=torch.Generator().manual_seed(0)).double()))
    distances = randn(1200, 3)
    truth = ((wanted - distances) / temperature + gumbel).argmax(1)  # draws of softmax((offset - d) / temperature)
    offsets, found = fit_offsets(distances, truth)
    torch.testing.assert_close(offsets, wanted, rtol=0, atol=0.1)
    assert found == pytest.approx(temperature, abs=0.05)


def test_a_task_that_always_looks_too_far_is_moved_nearer():
    distances = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.5, 3.0], [0.0, 2.0, 0.5]]).repeat(4, 1)
    tasks = torch.tensor([0, 1, 2]).repeat(4)
    offsets, temperature = fit_offsets(distances, tasks)
    assert ((offsets - distances) / temperature).argmax(1).tolist() == tasks.tolist()
    assert float(offsets.sum()) == pytest.approx(0)


# Selection


@pytest.mark.parametrize(
    ("row", "threshold", "top_k", "expected"),
    [
        ([0.5, 0.3, 0.2], 0.2, 3, (0, 1)),  # above, not equal
        ([0.1, 0.3, 0.6], 0.2, 3, (1, 2)),  # sorted by task
        ([0.3, 0.25, 0.25, 0.2], 0.1, 2, (0, 1)),  # at most two; the earlier of equals
        ([0.4, 0.35, 0.25], 0.9, 3, (0,)),  # none above: the largest
        ([1.0], 0.2, 3, (0,)),
        ([0.26, 0.25, 0.25, 0.24], 0.2, 9, (0, 1, 2, 3)),
    ],
)
def test_tasks_above_the_threshold_are_chosen(row, threshold, top_k, expected):
    assert select(torch.tensor([row]), threshold, top_k) == [expected]


# Redundancy


def test_cosines_of_factors_are_those_of_the_matrices():
    deltas = [randn(20, 12, seed=seed) @ torch.diag(torch.arange(1, 13) ** -0.5).double() for seed in range(4)]
    factors = [live_factors(delta, k) for delta, k in zip(deltas, (3, 12, 1, 5), strict=True)]
    every = concatenated(factors)
    found = cosines(every.u.mT @ every.u, every.v.mT @ every.v, every.s, [each.rank for each in factors])
    dense = torch.stack([each.dense().flatten() for each in factors])
    unit = dense / dense.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, unit @ unit.mT)


def test_tasks_are_left_out_in_order():
    similar = torch.eye(4)
    for a, b in itertools.pairwise(range(4)):
        similar[a, b] = similar[b, a] = 0.5
    assert without_duplicates(similar, 0.3) == [0, 2]  # 1 is like 0; 2 is like 1, which is gone
    assert without_duplicates(similar, 0.5) == [0, 1, 2, 3]
    assert without_duplicates(-similar, 0.3) == [0, 1, 2, 3]  # opposite is not the same


def test_arguments_are_not_touched():
    z, own, drawn = randn(5, 20), basis(6, 20, seed=1), randn(4, 3).abs()
    before = [value.clone() for value in (z, own, drawn)]
    for norm in NORMS:
        mean_distance([z, z], [[own, own]] * 2, norm)
    select(coefficients(drawn), 0.2, 2)
    assert all(torch.equal(a, b) for a, b in zip((z, own, drawn), before, strict=True))
