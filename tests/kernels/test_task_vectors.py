"""Sums over slices, against float64."""

import math

import numpy as np
import pytest
import torch

from mergetool.kernels.task_vectors import density_of_energy, energy_in_largest, tally


def stacked(n=3, length=5000, seed=0):
    """A base and n task vectors, some entries of which are untouched."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 1, length, generator=generator)
    x[1:] *= 0.01 * (torch.rand(n, length, generator=generator) < 0.7)
    return x


def test_every_sum_is_that_of_float64():
    x = stacked()
    found, exact = tally(x, 5000), x.double().numpy()
    changes, drawn = exact[1:], found.drawn
    assert found.gram == pytest.approx(exact @ exact.T, rel=1e-5, abs=1e-4)
    assert found.changed.tolist() == [np.count_nonzero(row) for row in changes]
    assert found.largest == pytest.approx(np.abs(changes).max(1))
    signs = np.sign(changes)
    assert (drawn.agreement == signs @ signs.T).all()
    assert (drawn.moved == np.abs(signs) @ np.abs(signs).T).all()
    assert drawn.conflicts == int(((signs > 0).any(0) & (signs < 0).any(0)).sum())
    assert drawn.mass == pytest.approx(np.abs(changes).sum(1))
    assert drawn.mass_of_sum == pytest.approx(np.abs(changes.sum(0)).sum(), rel=1e-5)
    mean = changes.mean(0)
    assert drawn.mean2 == pytest.approx((mean**2).sum(), rel=1e-5)
    merged = torch.from_numpy(exact[0] + mean).float()
    assert drawn.survived == int((merged.bfloat16() != x[0].bfloat16()).sum())
    assert drawn.lost2 == pytest.approx(float((merged.bfloat16().double() - merged.double()).square().sum()), rel=1e-3)


def test_slices_add_up_to_the_whole():
    x = stacked()
    whole, parts = tally(x, 5000), tally(x[:, :1777], 1777) + tally(x[:, 1777:], 3223)
    assert parts.gram == pytest.approx(whole.gram, rel=1e-5, abs=1e-7)
    assert (parts.drawn.magnitudes == whole.drawn.magnitudes).all()
    assert (parts.changed.tolist(), parts.drawn.conflicts) == (whole.changed.tolist(), whole.drawn.conflicts)
    assert (parts.largest == whole.largest).all()


def test_a_part_stands_for_all():
    x = stacked(length=80000)
    part, whole = tally(x, 10000).in_full().drawn, tally(x, 80000).drawn
    assert part.entries == 80000
    assert part.conflicts == pytest.approx(whole.conflicts, rel=0.05)
    assert part.mass == pytest.approx(whole.mass, rel=0.05)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_what_the_largest_entries_hold(density):
    x = stacked(n=1, length=40000)
    found = tally(x, 40000)
    sizes = np.sort(np.abs(x[1].double().numpy()))[::-1]
    count = round(density * len(sizes))
    for power in (1, 2):
        expected = (sizes[:count] ** power).sum() / (sizes**power).sum()
        held = energy_in_largest(found.drawn.magnitudes[0], found.entries, density, power)
        assert held == pytest.approx(expected, rel=0.01)
    needed = density_of_energy(found.drawn.magnitudes[0], found.entries, 0.9)
    energy = (sizes**2).cumsum() / (sizes**2).sum()
    assert needed == pytest.approx((energy < 0.9).sum() / len(sizes), rel=0.02)


def test_of_nothing_there_are_no_shares():
    x = stacked()
    x[1:] = 0
    found = tally(x, 5000)
    assert math.isnan(energy_in_largest(found.drawn.magnitudes[0], 5000, 0.1))
    assert math.isnan(density_of_energy(found.drawn.magnitudes[0], 5000, 0.9))
    assert (found.drawn.conflicts, found.drawn.touched) == (0, 0)


def test_what_is_not_finite_is_counted_and_left_out():
    x = stacked()
    x[1, 3], x[2, 4] = math.nan, math.inf
    found = tally(x, 5000)
    sound = x.clone()
    sound[:, 3:5] = 0
    assert found.broken.tolist() == [0, 1, 1, 0]
    assert found.gram == pytest.approx((sound.double() @ sound.double().T).numpy(), rel=1e-5, abs=1e-4)


def test_a_slice_without_entries_adds_nothing():
    x = stacked()
    whole, none = tally(x, 5000), tally(x[:, :0], 0)
    both = whole + none
    assert (none.entries, both.entries) == (0, 5000)
    assert (both.gram == whole.gram).all()
    assert (both.drawn.magnitudes == whole.drawn.magnitudes).all()
    assert (whole + tally(x, 0)).drawn.entries == 5000  # nor does one that is not looked at
