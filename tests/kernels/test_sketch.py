"""Leading directions and spectra, against full decompositions in float64."""

import math

import pytest
import torch

from mergetool.kernels.sketch import shared, spectrum


def with_spectrum(m, n, s, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(s), generator=generator, dtype=torch.float64))[0]
    return ((u * s) @ v.mT).float()


def figures(delta):
    s = torch.linalg.svdvals(delta.double())
    whole = s.square().sum()
    return {
        "effective_rank": float(whole**2 / s.pow(4).sum()),
        "stable_rank": float(whole / s[0] ** 2),
        "energy": float(s[:16].square().sum() / whole),
    }


@pytest.mark.parametrize(
    ("shape", "decay", "tolerance"), [((300, 500), 0.6, 0.02), ((600, 250), 1.5, 0.002), ((40, 60), 0.6, 1e-5)]
)
def test_figures_are_those_of_the_whole_spectrum(shape, decay, tolerance):
    delta = with_spectrum(*shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay)
    _, found = spectrum(delta, 16)
    told = {"effective_rank": found.effective_rank, "stable_rank": found.stable_rank, "energy": found.energy(16)}
    assert told == pytest.approx(figures(delta), rel=tolerance)


def test_noise_lies_at_its_edge_and_what_has_directions_above():
    noise = torch.randn(400, 900, generator=torch.Generator().manual_seed(0))
    assert 0.8 < spectrum(noise, 16)[1].edge < 1.02
    assert spectrum(noise, 16)[1].effective_rank == pytest.approx(figures(noise)["effective_rank"], rel=0.05)
    small = noise[:60, :90].contiguous()
    assert spectrum(small, 16)[1].edge == pytest.approx(1.0, abs=0.1)
    assert spectrum(noise + 5 * with_spectrum(400, 900, torch.full((2,), 30.0)), 16)[1].edge > 2


def test_directions_are_orthonormal_and_the_leading_ones():
    delta = with_spectrum(300, 500, torch.tensor([4.0, 3.0, 2.0] + [0.01] * 200, dtype=torch.float64))
    leading, _ = spectrum(delta, 3)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    assert leading.s.tolist() == pytest.approx(s[:3].tolist(), rel=1e-4)
    assert shared(leading.u, u[:, :3].float()) == pytest.approx(1.0, abs=1e-4)
    assert shared(leading.v, vh[:3].mT.float()) == pytest.approx(1.0, abs=1e-4)


def test_of_nothing_there_are_no_directions():
    leading, found = spectrum(torch.zeros(30, 20), 16)
    assert (leading.rank, found.norm2) == (0, 0.0)
    assert all(map(math.isnan, (found.edge, found.effective_rank, found.stable_rank, found.energy(1))))
    assert math.isnan(shared(leading.u, leading.u))


def test_a_product_of_thin_matrices_has_no_more_directions_than_they():
    leading, found = spectrum(with_spectrum(300, 400, torch.ones(5)), 16)
    assert leading.rank == 5
    assert found.energy(5) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (300, 200)])
def test_numbers_without_room_for_squares_in_float32(shape):
    leading, found = spectrum(torch.full(shape, 3e38), 16)
    assert len(leading.s) == 1
    assert leading.s.isfinite().all()
    assert found.effective_rank == pytest.approx(1, rel=1e-3)
