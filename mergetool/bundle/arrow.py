"""All experts at once, each with a share: what Arrow's router does instead of choosing a group of tasks.

At the matrix of a linear layer, x W0^T + sum of w_t (x V_t) S_t U_t^T. The shares w_t are those of the token x itself
(`per: token`, each matrix decides for itself), or of its whole sequence, which the first pass found. What is no such
matrix (embeddings, norms, biases, convolutions) is that of all tasks as one group; but for Arrow, the bias of a linear
layer has the shares of its matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergetool.bundle.factors import TaskFactors
from mergetool.bundle.manifest import Router
from mergetool.kernels.arrow import gates, lengths, prototypes, shares, similarities


@dataclass(frozen=True)
class _Site:
    """One matrix of all experts side by side, in the dtype of the model."""

    reads: Tensor
    """(inputs, K)."""
    writes: Tensor
    """(K, outputs), with the singular values in it."""
    owner: Tensor
    """(K,): whose direction it is."""
    compared: Tensor
    """Prototypes (T, inputs), or gates (T, k, inputs), float32."""


class Mixer:
    """The matrices of a bundle's experts, put side by side when they are first used. Safe for several threads."""

    def __init__(self, factors: TaskFactors, router: Router) -> None:
        self.factors = factors
        self.router = router
        self._known: dict[str, _Site] = {}

    def mix(self, weights: Tensor) -> "Mix":
        """How a pass mixes the experts whose shares of every sample these are."""
        return Mix(self, None if self.router.per == "token" else weights)

    def site(self, name: str, like: Tensor, *, turned: bool) -> _Site:
        known = self._known.get(name)
        if known is None or known.reads.device != like.device or known.reads.dtype != like.dtype:
            known = self._known[name] = self._side_by_side(name, like, turned=turned)
        return known

    def biases(self, name: str, like: Tensor) -> Tensor:
        """(T, outputs): what every expert adds to a bias."""
        tasks = range(len(self.factors.manifest.tasks))
        return torch.stack([self.factors.in_full(task, name) for task in tasks]).to(like)

    def _side_by_side(self, name: str, like: Tensor, *, turned: bool) -> _Site:
        gate = self.router.gate
        every = [self.factors.of(task, name) for task in range(len(self.factors.manifest.tasks))]
        every = [each.mT for each in every] if turned else every
        ranks = torch.tensor([each.rank for each in every])
        bases = [each.v.mT.float() for each in every]
        return _Site(
            torch.cat([each.v for each in every], 1).to(like),
            torch.cat([each.u * each.s for each in every], 1).mT.to(like),
            torch.arange(len(every)).repeat_interleave(ranks).to(like.device),
            (prototypes(bases) if gate is None else gates(bases, gate.directions)).to(like.device),
        )


@dataclass(frozen=True)
class Mix:
    """The shares of experts in one pass."""

    mixer: Mixer
    weights: Tensor | None = None
    """(samples, T); None: every token's own."""

    def take(self, samples: Sequence[int]) -> "Mix":
        """The same for some of the samples."""
        return self if self.weights is None else replace(self, weights=self.weights[list(samples)])

    @property
    def of_biases(self) -> bool:
        """Whether the bias of a layer has the shares of its matrix."""
        return self.mixer.router.gate is not None or self.mixer.router.norm != "arrow"

    def change(self, x: Tensor, name: str, *, turned: bool, bias: str | None = None) -> Tensor:
        """What experts add to what a linear layer makes of x (rows, ..., inputs); `turned`: W0 is (inputs, outputs).

        `bias`: that of the layer, if it is to have the same shares.
        """
        site = self.mixer.site(name, x, turned=turned)
        weights = (self._of_tokens(x, site) if self.weights is None else _spread(self.weights, x)).to(x)
        change = ((x @ site.reads) * weights[..., site.owner]) @ site.writes
        return change if bias is None else change + weights @ self.mixer.biases(bias, x)

    def _of_tokens(self, x: Tensor, site: _Site) -> Tensor:
        router, gate = self.mixer.router, self.mixer.router.gate
        if gate is not None:
            return shares(lengths(x.float(), site.compared), gate.temperature, gate.top_k)
        return shares(similarities(x.float(), site.compared), router.temperature, router.top_k)


def _spread(weights: Tensor, x: Tensor) -> Tensor:
    """Shares (samples, T) as those of rows of x (rows, ..., inputs), several of which may be of one sample."""
    each, rest = divmod(len(x), len(weights))
    assert rest == 0, f"{len(x)} rows for {len(weights)} samples"
    rows = weights.to(x.device).repeat_interleave(each, 0)
    return rows.view(len(rows), *[1] * (x.ndim - 2), -1)
