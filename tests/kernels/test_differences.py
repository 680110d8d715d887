"""Sums of slices come to what float64 says of whole tensors."""

import math

import pytest
import torch

from mergetool.kernels.differences import Sums, cosine, linear_cka, ratio, stitched, sums


def three(length=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(length, generator=generator, dtype=torch.float64)
    a, b = (base + 0.1 * torch.randn(length, generator=generator, dtype=torch.float64) for _ in range(2))
    b[: length // 2] = a[: length // 2]
    return a, b, base


@pytest.mark.parametrize("slices", [1, 3, 7])
def test_slices_add_up_to_the_whole(slices):
    a, b, base = three()
    parts = zip(a.chunk(slices), b.chunk(slices), base.chunk(slices), strict=True)
    found = sum((sums(*part) for part in parts), Sums())
    assert (found.entries, found.changed, found.broken) == (1000, 500, 0)
    assert found.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), rel=1e-12)
    assert found.largest == float((b - a).abs().max())
    da, db = a - base, b - base
    assert ratio(found.da2, found.base2) == pytest.approx(float(da.norm() / base.norm()), rel=1e-12)
    assert ratio(found.db2, found.base2) == pytest.approx(float(db.norm() / base.norm()), rel=1e-12)
    assert cosine(found.dadb, found.da2, found.db2) == pytest.approx(float(torch.cosine_similarity(da, db, dim=0)))
    assert found.opposed == int((da.sign() * db.sign() < 0).sum())


def test_one_tensor_twice_is_known_to_be_the_same():
    a, _, base = three()
    assert sums(a, a) == sums(a, a.clone())
    assert sums(a, a, base) == sums(a, a.clone(), base)
    assert sums(a, a).changed == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_counted_and_left_out(value):
    a, b, base = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, 2, 3], [1.0, 4, 3], [0.0, 0, 1]))
    b[2] = value
    found = sums(a, b, base)
    assert (found.entries, found.changed, found.broken, found.largest) == (3, 2, 1, math.inf)
    assert (found.a2, found.b2, found.off2, found.dadb) == (5.0, 17.0, 4.0, 9.0)
    a[2] = value
    both = sums(a, b)
    assert (both.changed, both.broken, both.largest) == (1, 1, 2.0)
    assert sums(a, a).changed == 0


def test_nothing_has_no_direction():
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert math.isnan(sums(zeros, ones).cosine)
    assert (sums(zeros, ones).relative, sums(zeros, zeros).relative) == (math.inf, 0.0)
    assert sums(zeros[:0], ones[:0]) == Sums()


def test_linear_cka_is_its_formula_and_sees_no_rotation_scale_or_shift():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, width, generator=generator, dtype=torch.float64) for width in (6, 9))
    centred = [table - table.mean(0) for table in (x, y)]
    cross, own = (centred[1].T @ centred[0]).norm() ** 2, [(each.T @ each).norm() for each in centred]
    assert linear_cka(x, y) == pytest.approx(float(cross / (own[0] * own[1])))
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * y @ rotation + 1) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x, x) == pytest.approx(1)
    assert math.isnan(linear_cka(x, torch.ones(20, 2)))


def test_stitching_tells_what_an_affine_map_gives_on_other_rows():
    torch.manual_seed(0)
    x, noise = torch.randn(64, 6), torch.randn(64, 4)
    y = x @ torch.randn(6, 4) + 3
    assert stitched(x, y, ridge=1e-9) == pytest.approx(1)
    assert stitched(x, noise) < 0.1
    lost = there = 0.0
    for fitted, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        a, b = x[fitted].double(), (y + noise)[fitted].double()
        centred = a - a.mean(0)
        weight = 0.01 * centred.square().sum() / len(a)
        by_hand = torch.linalg.solve(centred.T @ centred + weight * torch.eye(6), centred.T @ (b - b.mean(0)))
        told = (y + noise)[other].double() - b.mean(0)
        lost += (told - (x[other].double() - a.mean(0)) @ by_hand).square().sum()
        there += told.square().sum()
    assert stitched(x, y + noise) == pytest.approx(float(1 - lost / there))
    assert math.isnan(stitched(x, torch.ones(64, 2)))
