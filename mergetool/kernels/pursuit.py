"""Orthogonal matching pursuit: write vectors as sums of few others, the one that explains most of the rest at a time.

Reference: Pati, Rezaiifar and Krishnaprasad 1993; for tokens: Goddard and Fernandes Neto, arXiv:2506.06607.
Differs from the paper: an atom that adds nothing to those before it gets the coefficient 0.
"""

import torch
from torch import Tensor

_NOTHING = 1e-6
"""The part of an atom that is new, relative to its length, below which it counts as none."""


def pursue(targets: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The atoms (numbers, width) that are chosen for each target (vectors, width), in order, and their coefficients.

    Both (vectors, chosen), the coefficients in float64. At most `count` are chosen.
    """
    count = min(count, len(atoms))
    wanted = targets.double()
    num, width = wanted.shape
    basis = wanted.new_zeros(num, count, width)  # orthonormal, grows with each atom
    triangle = torch.eye(count, dtype=wanted.dtype, device=wanted.device).repeat(num, 1, 1)
    chosen = torch.zeros(num, count, dtype=torch.long, device=wanted.device)
    taken = torch.zeros(num, len(atoms), dtype=torch.bool, device=wanted.device)
    rest = wanted.clone()
    for step in range(count):
        scores = (rest.to(atoms.dtype) @ atoms.mT).abs_().masked_fill_(taken, -1)
        chosen[:, step] = scores.argmax(1)
        taken.scatter_(1, chosen[:, step : step + 1], True)
        atom = atoms[chosen[:, step]].double()
        new, shares = _new_part(atom, basis[:, :step])
        length = new.norm(dim=1)
        adds = length > _NOTHING * atom.norm(dim=1)
        triangle[:, :step, step] = torch.where(adds[:, None], shares, 0.0)
        triangle[:, step, step] = torch.where(adds, length, 1.0)
        basis[:, step] = torch.where(adds[:, None], new / length[:, None].clamp_min(1e-300), 0.0)
        rest = rest - basis[:, step] * (basis[:, step] * rest).sum(1, keepdim=True)
    known = basis @ wanted[:, :, None]  # (vectors, chosen, 1)
    return chosen, torch.linalg.solve_triangular(triangle, known, upper=True).squeeze(2)


def _new_part(atom: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of each atom (vectors, width) lies outside its basis (vectors, step, width), and its shares of that basis.

    Done twice, since once leaves rounding.
    """
    new, total = atom, atom.new_zeros(basis.shape[:2])
    for _ in range(2):
        shares = (basis @ new[:, :, None]).squeeze(2)
        new = new - (shares[:, None, :] @ basis).squeeze(1)
        total = total + shares
    return new, total
