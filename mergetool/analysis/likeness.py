"""How alike what models make of the same rows is, block by block: linear CKA of what a block says on average.

1: the same up to a rotation and a factor; what two models say of few rows is like each other by chance, too. Beside it,
whether a linear layer could stitch one to the other: what of b's block an affine map of a's tells (`forth`), and of a's
that of b's (`back`), on rows that it was not fitted to.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mergetool.kernels.differences import linear_cka, stitched
from mergetool.statistics.base import tensor_of
from mergetool.statistics.examples import Example, batches
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def likeness_rows(
    models: Mapping[str, ModelSource], examples: Sequence[Example], device: "torch.device"
) -> list[dict[str, Any]]:
    """For every two models and every block, their CKA over these rows, and how well each tells the other.

    Nothing of fewer than three rows.
    """
    if len(examples) < 3:
        return []
    said = {name: _said(source, examples, device, name) for name, source in models.items()}
    return [
        {"a": a, "b": b, "block": block, "cka": linear_cka(first, second), **_told(first, second)}
        for a, b in combinations(said, 2)
        if len(said[a]) == len(said[b])
        for block, (first, second) in enumerate(zip(said[a], said[b], strict=True))
    ]


def _told(first: "Tensor", second: "Tensor") -> dict[str, float]:
    return {"forth": stitched(first, second), "back": stitched(second, first)}


def _said(source: ModelSource, examples: Sequence[Example], device: "torch.device", name: str) -> "list[Tensor]":
    """What each block makes of every row, the mean over its tokens: (rows, channels)."""
    import torch

    from mergetool.networks.running import load_network
    from mergetool.networks.ways import blocks_of

    network = load_network(source, torch.float32, device, name)
    blocks = blocks_of(network.model)
    heard: list[list[Tensor]] = [[] for _ in blocks]

    def listening(place: int) -> Any:
        return lambda _, __, made: heard[place].append((made[0] if isinstance(made, tuple) else made).mean(1).cpu())

    hooks = [block.register_forward_hook(listening(place)) for place, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            for batch in batches(examples):
                network.model(**tensor_of(batch, network.device))
    finally:
        for each in hooks:
            each.remove()
    return [torch.cat(rows) for rows in heard]
