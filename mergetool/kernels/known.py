"""Is an input like those of any task? Told by five scores, each of which other strange inputs fail.

nearness    how much of the features the nearest task explains (minus its distance): low for noise
spread      log of the variance of features over tokens, over the square of their mean: low for what repeats itself
whole       how much better another task explains a beginning or an end than the one that is nearest to all of it: low
            where inputs of two tasks are glued together
seen        share of tokens whose embeddings the nearest task's training has moved: low for words it has never seen
seen_whole  how many more of the first or the last tokens another task's training has seen: low, again, for two tasks

What a score is worth is known beforehand for inputs that are made up: `strange`, of the kind that fails it, and
`usual`. Doubt is the length of the vector of shortfalls, where 0 is usual and 1 as strange as those: an input that
fails one score as strange ones do, or several half as badly, is unknown.

Legend: B samples, L tokens, D features, T tasks, k directions of one; bases are (k, D), rows orthonormal.

Reference: none; the scores are this house's own (what was tried: scripts/studies/mass/README.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.kernels.routing import nats

_LEAST_TOKENS = 3
"""Tokens of a beginning or an end of which features are judged."""
_LEAST_WORDS = 4
"""Tokens that are words, of a beginning or an end of which it is asked whether they were seen."""
WORST = 3.0
"""Most that one score adds to doubt."""


@dataclass(frozen=True)
class Parts:
    """What beginnings and ends of inputs look like at one matrix."""

    beginnings: Tensor
    """(B, L, T): share of their mean's squared length inside each task's span, up to and with each token."""
    ends: Tensor
    """(B, L, T): of what comes after each token."""
    spread: Tensor
    """(B,)."""


def parts(x: Tensor, mask: Tensor, bases: Sequence[Tensor]) -> Parts:
    """Parts of features x (B, L, D), float32, of tokens that count where `mask` (B, L) is not 0."""
    tiny = torch.finfo(x.dtype).tiny
    kept = mask.ne(0).to(x.dtype)
    x = x * kept.unsqueeze(-1)
    sums = x.cumsum(1)
    rest = sums[:, -1:] - sums
    count = kept.sum(1).clamp_min(1)
    mean = (sums[:, -1] / count[:, None]).square().sum(-1).clamp_min(tiny)
    spread = ((x.square().sum((1, 2)) / count - mean) / mean).clamp_min(1e-6).log()
    return Parts(_shares(sums, bases), _shares(rest, bases), spread)


def _shares(x: Tensor, bases: Sequence[Tensor]) -> Tensor:
    inside = [(x @ basis.mT).square().sum(-1) for basis in bases]
    return torch.stack(inside, -1) / x.square().sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def whole(several: Sequence[Parts], mask: Tensor, bases: Sequence[Sequence[Tensor]], nearest: Tensor) -> Tensor:
    """(B,), at most 0: `whole` of parts at several matrices; `nearest` (B,): the nearest tasks of all of it."""
    sizes = [own[0].shape[1] for own in bases]
    ranks = [[basis.shape[0] / size for basis in own] for own, size in zip(bases, sizes, strict=True)]
    expected = torch.tensor(ranks, device=mask.device).mean(0)
    position = mask.ne(0).cumsum(1)
    enough = (position >= _LEAST_TOKENS) & (position[:, -1:] - position >= _LEAST_TOKENS)
    better = [
        _better(nats(torch.stack(shares).mean(0), expected, sum(sizes) / len(sizes)), nearest, enough)
        for shares in ([each.beginnings for each in several], [each.ends for each in several])
    ]
    return -torch.maximum(*better)


def seen(table: Tensor, ids: Tensor, words: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """`seen` and `seen_whole` (B,) of tokens `ids` (B, L), of which `words` (B, L) are more than markup.

    table (T, vocabulary): whether a task's training has moved a token's embedding.
    """
    known = table[:, ids].movedim(0, -1).to(torch.float32) * words.unsqueeze(-1)
    sums, counts = known.cumsum(1), words.to(torch.float32).cumsum(1)
    rest, left = sums[:, -1:] - sums, counts[:, -1:] - counts
    shares = [part / number.clamp_min(1).unsqueeze(-1) for part, number in ((sums, counts), (rest, left))]
    own = shares[0][:, -1].gather(1, nearest[:, None])[:, 0]
    better = [
        _better(share, nearest, number >= _LEAST_WORDS) for share, number in zip(shares, (counts, left), strict=True)
    ]
    return own, -torch.maximum(*better)


def _better(claims: Tensor, nearest: Tensor, enough: Tensor) -> Tensor:
    """(B,): by how much another task's claim (B, L, T) exceeds that of the nearest one at most, where `enough`."""
    own = claims.gather(2, nearest[:, None, None].expand(-1, claims.shape[1], 1))[..., 0]
    return (claims.amax(-1) - own).masked_fill(~enough, 0).amax(1)


def doubt(scores: Tensor, strange: Tensor, usual: Tensor) -> Tensor:
    """(B,): doubt of scores (B, J), given those (J,) of strange and of usual inputs."""
    return ((usual - scores) / (usual - strange)).clamp(0, WORST).square().sum(-1).sqrt()


def participation(features: Sequence[Tensor]) -> float:
    """How many dimensions the features (B, D_i) of several matrices really have, side by side and of equal variance.

    (sum of variances)^2 over the sum of their squares, along principal axes.
    """
    gram = torch.zeros(len(features[0]), len(features[0]), dtype=torch.float64, device=features[0].device)
    for each in features:
        centred = (each - each.mean(0)).to(torch.float64)
        gram += centred @ centred.mT / centred.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(gram.trace().square() / gram.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
