"""Directions along which changes of weights change outputs most, of several tasks, made orthogonal together.

Reference: Li et al., Model Merging in the Essential Subspace, CVPR 2026, https://arxiv.org/abs/2602.20208.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.kernels.eigen import checked_eigh
from mergetool.kernels.spectral import Rank, energy_rank, polar, rank_limit

NOTHING = 1e-12
"""Share of the largest change, squared, below which a direction changes nothing."""


@dataclass(frozen=True)
class EssentialPair:
    """Directions of outputs (m, k), and what reads them (k, n): their product is nearly the change."""

    outputs: Tensor
    reads: Tensor


def essential_pair(change: Tensor, gram: Tensor, rank: Rank, num_tasks: int, energy: float) -> EssentialPair:
    """The leading directions of what a change (m, n) does to outputs on inputs with this Gram matrix.

    `rank` says how many, as a share of the outputs where it is one. Both sides of a direction are multiplied by
    `(its energy / the mean)^energy`, made to have a mean of 1. All float64.
    """
    values, vectors = _directions(change, gram)
    most = rank_limit(rank, len(change), num_tasks)
    if isinstance(rank, Mapping):
        most = energy_rank(values.clamp_min(0).sqrt(), rank["energy"])
    values, vectors = values[:most], vectors[:, :most]
    live = values > NOTHING * values[:1].clamp_min(0)
    values, vectors = values[live], vectors[:, live]
    if not len(values):
        return EssentialPair(vectors, vectors.T @ change)
    share = (values / values.mean()) ** energy
    share = share / share.mean()
    return EssentialPair(vectors * share, (vectors.T @ change) * share[:, None])


def _directions(change: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of `D G D^T`, largest first, and eigenvectors: as many as the smaller side of D."""
    if change.shape[0] <= change.shape[1]:
        values, vectors = checked_eigh(change @ gram @ change.T)
        return values.flip(0), vectors.flip(1)
    sizes, axes = checked_eigh(gram)
    image = change @ (axes * sizes.clamp_min(0).sqrt())
    values, turned = checked_eigh(image.T @ image)
    values, turned = values.flip(0).clamp_min(0), turned.flip(1)
    return values, (image @ turned) / values.sqrt().clamp_min(1e-300)


def joined(
    pairs: Sequence[EssentialPair], weights: Sequence[float], lengths: Sequence[float], contrast: float
) -> Tensor:
    """The merged change (m, n): directions of all tasks orthogonal, and what reads them, of mean length; twice.

    A task counts by its length (and an input by that of all that reads it) relative to the mean, to this power.
    """
    mean = sum(lengths) / len(lengths)
    reads = torch.cat(
        [
            pair.reads * (weight * (length / mean) ** contrast)
            for pair, weight, length in zip(pairs, weights, lengths, strict=True)
        ]
    )
    columns = reads.norm(dim=0)
    if float(columns.mean()) > 0:
        reads = reads * (columns / columns.mean()) ** contrast
    return 2 * (_even(torch.cat([pair.outputs for pair in pairs], dim=1)) @ _even(reads))


def _even(x: Tensor) -> Tensor:
    """The nearest orthonormal matrix, times the mean of the singular values."""
    nearest = polar(x)
    return nearest * (float((nearest * x).sum()) / min(x.shape))
