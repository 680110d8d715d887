"""Orthogonal matching pursuit: worked examples, and a slow reference."""

import torch
from torch.testing import assert_close

from mergetool.kernels.pursuit import pursue


def test_the_atom_that_explains_most_is_taken_first():
    atoms = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    chosen, shares = pursue(torch.tensor([[3.0, 8.0, -1.0]]), atoms, 2)
    assert chosen.tolist() == [[1, 0]]
    assert shares.tolist() == [[4.0, 3.0]]


def test_coefficients_are_fitted_together():
    """The second atom is not orthogonal to the first, whose share changes when it comes."""
    chosen, shares = pursue(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 2)
    assert chosen.tolist() == [[1, 0]]
    assert_close(shares, torch.tensor([[1.0, 1.0]], dtype=torch.float64))


def test_atoms_that_add_nothing_count_for_nothing():
    """More atoms than dimensions, and one that is there twice."""
    atoms = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    targets = torch.tensor([[5.0, 1.0], [0.0, 0.0]])
    chosen, shares = pursue(targets, atoms, 64)
    assert chosen.shape == (2, 4)
    assert torch.isfinite(shares).all()
    assert_close((shares[:, None, :] @ atoms[chosen].double()).squeeze(1), targets.double())


def test_it_is_what_a_least_squares_fit_after_each_choice_gives():
    generator = torch.Generator().manual_seed(0)
    atoms, targets = torch.randn(60, 24, generator=generator), torch.randn(7, 24, generator=generator)
    chosen, shares = pursue(targets, atoms, 10)
    for row, target in enumerate(targets.double()):
        taken, rest = [], target
        for _ in range(10):
            scores = (atoms.double() @ rest).abs()
            scores[taken] = -1
            taken.append(int(scores.argmax()))
            basis = atoms[taken].double().mT
            fitted = torch.linalg.lstsq(basis, target[:, None]).solution
            rest = target - (basis @ fitted).squeeze(1)
        assert chosen[row].tolist() == taken
        assert_close(shares[row], fitted.squeeze(1))
