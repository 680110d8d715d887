"""Which expert is a feature for? The one that acts most on its direction, told by one vector of each expert.

The prototype of an expert at a matrix is the top right singular vector v of what it changed there (of B A, for an
adapter): the direction of the inputs that fine-tuning made most of. How much an input x has of it is |x . v|, without
its sign, which a singular vector has by chance. Of the experts with the largest of these, a softmax makes shares.
SMILE takes several vectors V of an expert, its gate, and the length of V^T x.

Legend: T experts, D features, K directions of all experts together; prototypes are (T, D), gates (T, k, D).

Reference: Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, ICML 2024,
https://arxiv.org/abs/2405.11157 (Arrow); Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts
Construction From Pre-Trained Foundation Models, https://arxiv.org/abs/2408.10174, section 4.
Differs from the paper: an expert that changed nothing at a matrix has a prototype of zeros there; `mean_similarity`,
for one choice a sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def prototypes(bases: Sequence[Tensor]) -> Tensor:
    """(T, D): the first of every expert's right singular vectors (k, D), strongest first."""
    return torch.stack([basis[0] if len(basis) else basis.new_zeros(basis.shape[1]) for basis in bases])


def similarities(x: Tensor, prototypes: Tensor) -> Tensor:
    """|x . v| (..., T) of features x (..., D)."""
    return (x @ prototypes.mT).abs()


def gates(bases: Sequence[Tensor], k: int) -> Tensor:
    """(T, k, D): the first k of every expert's right singular vectors, and zeros where it has fewer."""
    kept = [basis[:k] for basis in bases]
    return torch.stack([torch.nn.functional.pad(basis, (0, 0, 0, k - len(basis))) for basis in kept])


def lengths(x: Tensor, gates: Tensor) -> Tensor:
    """|V^T x| (..., T) of features x (..., D) and every expert's gate."""
    inside = x @ gates.flatten(0, 1).mT
    found: Tensor = torch.linalg.vector_norm(inside.view(*x.shape[:-1], *gates.shape[:2]), dim=-1)
    return found


def mean_similarity(features: Sequence[Tensor], prototypes: Sequence[Tensor]) -> Tensor:
    """Similarities (B, T), the mean over several matrices with features (B, D_i) and prototypes each.

    Features are brought to a mean square of 1 first, or the layer with the longest ones would decide alone.
    """
    scaled = [z / z.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(z.dtype).tiny) for z in features]
    return torch.stack([similarities(z, own) for z, own in zip(scaled, prototypes, strict=True)]).mean(0)


def shares(similarities: Tensor, temperature: float, top_k: int) -> Tensor:
    """Shares (..., T) of the experts: a softmax of the `top_k` largest similarities; 0 for all others."""
    top, places = similarities.topk(min(top_k, similarities.shape[-1]), -1)
    return torch.zeros_like(similarities).scatter_(-1, places, torch.softmax(top / temperature, -1))
