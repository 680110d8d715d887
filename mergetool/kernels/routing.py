"""Which task does an input belong to? Measured by how much of its features each task's singular vectors explain.

Fine-tuning on a task changes a weight along the directions in which that task's inputs lie, so the right singular
vectors V_t of the task vector span (roughly) where features of task t live. A feature z is at distance

    r_t = || z - V_t^T V_t z ||

from that span, and the nearest task is the most likely one. Nothing is trained and no data are needed.

How likely? Let task t say that features are normal, with one variance inside its span and another one outside, both
unknown. With the share e = ||V_t z||^2 / ||z||^2 and k directions of D, the best fit beats the one that treats all
directions alike by

    D/2 ( q log(q/e) + (1 - q) log((1 - q)/(1 - e)) )    nats, q = k/D       (against the task where e < q)

For equal k this orders tasks as r_t does. Unlike r_t it is fair between tasks of different rank (a large span explains
much of anything), does not depend on the length of z, and its differences are log-odds of tasks. Over several matrices
the shares e and q and the numbers D are averaged first: matrices see the same sample, so they are no independent
witnesses.

Legend: B samples, T tasks, D features, k directions of a task; bases are (k, D), rows orthonormal.

Reference: Crisostomi et al., MASS: MoErging through Adaptive Subspace Selection, https://arxiv.org/abs/2504.05342,
section 3.
Differs from the paper: the norm `likelihood` above; distances may be collected over several matrices (`mean_distance`),
where lengths are taken relative to that of the feature; with one task there is nothing to choose and its coefficient
is 1.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["likelihood", "l2", "l1", "mahalanobis"]
Mode = Literal["topk", "weighted", "top1"]


def distance(z: Tensor, basis: Tensor, norm: Norm = "l2") -> Tensor:
    """Distance (B,) of features z (B, D) from the span of `basis` (k, D); the distance from 0 where k is 0.

    l2, l1: that norm of the residual. mahalanobis: sqrt(d^T C^-1 d) of the residual d, where C is the covariance of
    the basis' rows plus 0.001 on the diagonal. likelihood: minus the nats above.
    """
    if norm == "likelihood":
        return -nats(_inside(z, basis), basis.shape[0] / z.shape[1], z.shape[1])
    residual = z - (z @ basis.mT) @ basis
    if norm == "mahalanobis":
        lower = torch.linalg.cholesky(_covariance(basis))
        residual = torch.linalg.solve_triangular(lower, residual.mT, upper=False).mT
    return _length(residual, 1 if norm == "l1" else 2)


def _inside(z: Tensor, basis: Tensor) -> Tensor:
    """Share (B,) of the squared length of features that lies inside the span."""
    return (z @ basis.mT).square().sum(-1) / z.square().sum(-1).clamp_min(torch.finfo(z.dtype).tiny)


def nats(inside: Tensor, expected: Tensor | float, size: float) -> Tensor:
    """By how much a variance of its own inside the span explains features better than one variance for all.

    inside: shares e; expected: q = k/D, what they are for features that have nothing to do with the span; size: D.
    """
    tiny = torch.finfo(inside.dtype).eps
    q = torch.as_tensor(expected, dtype=inside.dtype, device=inside.device)
    e = inside.clamp(tiny, 1 - tiny)
    nats = size / 2 * (torch.special.xlogy(q, q / e) + torch.special.xlogy(1 - q, (1 - q) / (1 - e)))
    return torch.where((q > 0) & (q < 1), nats * (inside - q).sign(), 0)


def _covariance(basis: Tensor) -> Tensor:
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    if basis.shape[0] < 2:
        return 1e-3 * identity
    centred = basis - basis.mean(0)
    return centred.mT @ centred / (basis.shape[0] - 1) + 1e-3 * identity


def distances(z: Tensor, bases: Sequence[Tensor], norm: Norm = "l2") -> Tensor:
    """Distances (B, T) of features from every task's span."""
    return torch.stack([distance(z, basis, norm) for basis in bases], -1)


def mean_distance(features: Sequence[Tensor], bases: Sequence[Sequence[Tensor]], norm: Norm = "l2") -> Tensor:
    """Distances (B, T) collected over several matrices: features (B, D_i) and one basis per task for each.

    One matrix: the distance as it is. Several: the mean of lengths relative to that of the feature, because those
    differ between layers, and the layer with the longest features would decide alone. Likelihoods: that of mean shares.
    """
    if len(features) == 1:
        return distances(features[0], bases[0], norm)
    if norm == "likelihood":
        inside = [torch.stack([_inside(z, v) for v in own], -1) for z, own in zip(features, bases, strict=True)]
        sizes = [z.shape[1] for z in features]
        expected = [[v.shape[0] / size for v in own] for size, own in zip(sizes, bases, strict=True)]
        q = torch.tensor(expected, dtype=inside[0].dtype, device=inside[0].device).mean(0)
        return -nats(torch.stack(inside).mean(0), q, sum(sizes) / len(sizes))
    order = 1 if norm == "l1" else 2
    relative = [
        distances(z, own, norm) / _length(z, order).unsqueeze(-1).clamp_min(torch.finfo(z.dtype).tiny)
        for z, own in zip(features, bases, strict=True)
    ]
    return torch.stack(relative).mean(0)


def _length(x: Tensor, order: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, order, dim=-1)
    return length


def coefficients(distances: Tensor, mode: Mode = "topk", temperature: float = 1.0) -> Tensor:
    """Coefficients (B, T) from distances (B, T); rows sum to 1.

    topk: softmax of the negative distances after they were standardised over the tasks of a sample, so only their
    order and relative margins count (with two tasks always 0.804 and 0.196). weighted: softmax of the negative
    distances as they are, which for likelihoods is the probability of each task. top1: 1 for the nearest task.
    """
    num_tasks = distances.shape[-1]
    if num_tasks == 1:
        return torch.ones_like(distances)
    logits = -distances
    if mode == "top1":
        return torch.nn.functional.one_hot(logits.argmax(-1), num_tasks).to(distances.dtype)
    if mode == "topk":
        logits = (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-6)
    return torch.softmax(logits / temperature, -1)


def fit_offsets(distances: Tensor, tasks: Tensor) -> tuple[Tensor, float]:
    """Offsets (T,) and a temperature with which `softmax((offsets - distances) / temperature)` fits known tasks best.

    distances (B, T), tasks (B,): their numbers. Offsets are held back a little, as if each task had been seen once more
    at none, so few samples move them little. Offsets are float64 and sum to 0.
    """
    exact = distances.detach().to(torch.float64, copy=True)
    parameters = torch.zeros(exact.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = parameters[:-1] - exact * parameters[-1].exp()
        value = torch.nn.functional.cross_entropy(logits, tasks, reduction="sum") + parameters.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad(), torch.inference_mode(False):
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    temperature = float(torch.exp(-parameters.detach()[-1]))
    offsets = parameters.detach()[:-1] * temperature
    return offsets - offsets.mean(), temperature


def select(coefficients: Tensor, threshold: float, top_k: int) -> list[tuple[int, ...]]:
    """The tasks of each sample: coefficients above `threshold`, at most `top_k` of them, at least the largest.

    Indices are sorted, so that equal sets are equal whatever their coefficients.
    """
    ordered, order = coefficients.sort(dim=-1, descending=True, stable=True)
    counts = (ordered > threshold).sum(-1).clamp(1, top_k)
    return [tuple(sorted(row[:count])) for row, count in zip(order.tolist(), counts.tolist(), strict=True)]


def cosines(gram_left: Tensor, gram_right: Tensor, s: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cosines (T, T) between low-rank matrices; arguments as for `inner_products`."""
    return as_cosines(inner_products(gram_left, gram_right, s, sizes))


def as_cosines(inner: Tensor) -> Tensor:
    """Cosines (T, T) from inner products (T, T); 0 beside what has no length."""
    lengths = inner.diagonal().clamp_min(0).sqrt()
    return inner / (lengths[:, None] * lengths).clamp_min(torch.finfo(inner.dtype).tiny)


def inner_products(gram_left: Tensor, gram_right: Tensor, s: Tensor, sizes: Sequence[int]) -> Tensor:
    """tr(A^T B), (T, T), of low-rank matrices u_t diag(s_t) v_t^T, without multiplying any of them out.

    gram_left, gram_right (K, K): U^T U and V^T V of all factors side by side; s (K,); sizes: rank of each task.
    """
    weighted = gram_left * gram_right * s[:, None] * s
    tasks = torch.arange(len(sizes), device=s.device)
    owner = tasks.repeat_interleave(torch.tensor(sizes, device=s.device))
    member = (owner[:, None] == tasks).to(s)
    return member.mT @ weighted @ member


def without_duplicates(cosines: Tensor, limit: float) -> list[int]:
    """Tasks kept when, in order, each one is left out whose cosine with one kept before exceeds `limit`."""
    kept: list[int] = []
    for task, row in enumerate(cosines.tolist()):
        if all(row[other] <= limit for other in kept):
            kept.append(task)
    return kept
