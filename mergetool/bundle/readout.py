"""From the last layer to an answer: pooling, heads, and how sure a head is.

Heads were trained apart, on different numbers of classes, so their raw scores are on different scales. Before the best
of several heads may answer, its scores become log-probabilities, to which the routing coefficient is a prior.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergetool.bundle.manifest import Head, HeadRule, Pool


def head_scores(features: Tensor, head: Head, weights: Mapping[str, Tensor]) -> Tensor:
    """A head's scores (samples, classes) of pooled features (samples, features)."""
    if head.normalize:
        features = nn.functional.normalize(features, dim=-1)
    return nn.functional.linear(features, weights["weight"], weights["bias"])


def calibrated(scores: Tensor, claim: Tensor, rule: HeadRule, problem: str | None = None) -> Tensor:
    """How sure a head is (samples,), comparable between heads of unequal size.

    joint: log of coefficient times probability of the best class, the most likely pair of task and class if
    coefficients are the probabilities of the tasks. log-softmax: without the coefficient. max, mean: of raw scores, for
    heads on one scale. A head of several labels at once (`problem`) has the probability of its best set of labels.
    """
    if rule == "max":
        return scores.amax(-1)
    if rule == "mean":
        return scores.mean(-1)
    if problem == "multi_label_classification":
        sure = nn.functional.logsigmoid(scores.abs()).sum(-1)
    else:
        sure = scores.log_softmax(-1).amax(-1)
    return sure if rule == "log-softmax" else sure + claim.clamp_min(torch.finfo(claim.dtype).tiny).log()


def pool_tokens(x: Tensor, mask: Tensor | None, pool: Pool) -> Tensor:
    """(samples, tokens, features) -> (samples, features): the first token, the last one, or the mean, of unmasked ones.

    What has no axis of tokens is returned as it is. A mask of another length (pixels, frames) is not used.
    """
    if x.ndim == 2:
        return x
    x = x.flatten(1, -2)
    if mask is None or mask.ndim != 2 or mask.shape[1] != x.shape[1]:
        return {"cls": x[:, 0], "last": x[:, -1]}[pool] if pool != "mean" else x.mean(1)
    kept = mask.to(x.dtype)
    if pool == "mean":
        return (x * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device) * mask.ne(0)
    at = mask.ne(0).int().argmax(1) if pool == "cls" else places.argmax(1)
    return x[torch.arange(len(x), device=x.device), at]
