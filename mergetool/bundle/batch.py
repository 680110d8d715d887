"""Batches of a model's inputs: tensors with one row a sample, among other options.

A batch that is sorted by group can be cut into groups, each as long as its own longest sample.
"""

from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.errors import SourceError

_WORTH_SPLITTING = 0.8
"""Share of a batch's tokens up to which it is run group by group to leave out padding."""
_ENOUGH_TOKENS = 256
"""Tokens a group, on average, from which on one group after the other is as fast as all at once, or faster."""


def check_batch(inputs: Mapping[str, Tensor]) -> None:
    """Refuse batches without samples, and samples without tokens. Raises SourceError."""
    if not inputs or num_samples(inputs) == 0:
        raise SourceError("the batch is empty", "inputs", "give at least one sample")
    if any(value.numel() == 0 for value in inputs.values() if isinstance(value, Tensor)):
        raise SourceError("the samples are empty", "inputs", "give every sample at least one token")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and bool((mask.sum(1) == 0).any()):
        sample = int((mask.sum(1) == 0).nonzero()[0])
        raise SourceError(f"every token of sample {sample} is masked", "attention_mask", "leave that sample out")


def check_names(model: nn.Module, inputs: Collection[str]) -> None:
    """Raises SourceError where a model knows none of its inputs by name: many pass over what they do not know."""
    known = [name for name in signature(type(model).forward).parameters if name not in ("self", "args", "kwargs")]
    if inputs and known and not set(inputs) & set(known):
        main = getattr(model, "main_input_name", known[0])
        what = f"{type(model).__name__} has no input {' or '.join(sorted(inputs))}"
        raise SourceError(what, "inputs", f"give it its {main}: model({main}=...)")


def num_samples(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch: those of its first tensor that has any."""
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 0)


def lengths_in(batch: Mapping[str, Any], ends: Sequence[tuple[int, int]]) -> list[int] | None:
    """Tokens of the longest sample in each range of samples, where running them one by one pays; else None.

    Tasks have inputs of different lengths: run one after the other, each needs to be no longer than its own.
    """
    mask = batch.get("attention_mask")
    if mask is None or any(not isinstance(value, Tensor) or value.shape != mask.shape for value in batch.values()):
        return None
    used = [(mask[start:stop] != 0).any(0) for start, stop in ends]
    lengths = [int(columns.nonzero().max()) + 1 if bool(columns.any()) else 1 for columns in used]
    tokens = sum((stop - start) * length for (start, stop), length in zip(ends, lengths, strict=True))
    worth = tokens <= _WORTH_SPLITTING * mask.numel() or tokens >= _ENOUGH_TOKENS * len(ends)
    return lengths if worth else None


def take(inputs: Mapping[str, Any], samples: Sequence[int]) -> dict[str, Any]:
    """Some samples of a batch, in the order given."""
    total = num_samples(inputs)
    chosen = torch.tensor(samples, dtype=torch.long)
    return {
        key: value[chosen.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == total
        else value
        for key, value in inputs.items()
    }


def some_tokens(inputs: Mapping[str, Any], most: int, last: int = 0) -> tuple[dict[str, Any], Tensor] | None:
    """Samples cut to so many tokens, and which of them (samples,) are longer; None where none is, or without tokens.

    A sample is cut to its own first tokens, wherever its padding is, and to so many of its `last` ones.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] <= most:
        return None
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
    lengths = (mask != 0).sum(1, keepdim=True)
    if not bool((longer := (lengths > most).flatten()).any()):
        return None
    places = torch.arange(most, device=ids.device).expand(len(ids), -1)
    places = places + (places >= most - last) * (lengths - most).clamp_min(0)
    order = (mask == 0).int().argsort(dim=1, stable=True).gather(1, places)
    cut = {
        key: value.gather(1, order) if isinstance(value, Tensor) and value.shape == ids.shape else value
        for key, value in inputs.items()
    }
    return cut, longer


def device_of(inputs: Mapping[str, Tensor]) -> torch.device:
    """Where a batch is."""
    return next(iter(inputs.values())).device
