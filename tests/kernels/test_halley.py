"""The nearest orthonormal matrix by products is that of singular vectors, or there is none."""

import pytest
import torch

from mergetool.kernels.halley import nearest_orthonormal
from mergetool.kernels.spectral import NULL_DIRECTION, polar
from tests.elsewhere import DEVICE, Elsewhere
from tests.kernels.test_spectral import naive_polar, orthonormal, randn, relative

SMALLEST = 10 * NULL_DIRECTION


def beside(m, k, distance):
    """Two sets of directions that are near to each other, and two strangers."""
    first = orthonormal(m, k)
    second = torch.linalg.qr(first + distance * randn(m, k, seed=9) / m**0.5)[0]
    return torch.cat([first, second, orthonormal(m, k, 1), orthonormal(m, k, 2)], 1)


def live_polar(x):
    p, s, qh = torch.linalg.svd(x, full_matrices=False)
    return (p * (s > NULL_DIRECTION * s[0])) @ qh


@pytest.mark.parametrize("m", [64, 100, 300])
@pytest.mark.parametrize("distance", [1.0, 1e-3, 0.0])
def test_it_is_the_polar_factor_without_null_directions(m, distance):
    x = beside(m, 16, distance)
    nearest = nearest_orthonormal(x, SMALLEST)
    assert nearest is not None
    assert relative(nearest, live_polar(x)) < 1e-6


def test_directions_near_the_limit_are_not_for_products_to_judge():
    assert nearest_orthonormal(beside(300, 16, 3e-9), SMALLEST) is None
    assert nearest_orthonormal(beside(64, 16, 3e-9), SMALLEST) is None


@pytest.mark.parametrize("m", [64, 300])
@pytest.mark.parametrize("distance", [1.0, 3e-9, 0.0])
def test_a_device_takes_what_is_clear_from_products_and_the_rest_from_singular_vectors(m, distance):
    x = beside(m, 16, distance)
    with Elsewhere():
        found = polar(x.to(DEVICE)).cpu()
        filled = polar(x.to(DEVICE), fill=True).cpu()
    assert relative(found, live_polar(x)) < 1e-6
    torch.testing.assert_close(filled.mT @ filled, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-6)
    if distance == 1.0:
        assert relative(filled, naive_polar(x)) < 1e-6
