"""Continue prompts, group by group: each has its own weights, and its own cache of keys and values.

Networks that only decode continue what is last in a row, so prompts are moved to the right end of theirs first. A group
whose prompts are all shorter is not as wide as the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.bundle.batch import num_samples, take
from mergetool.bundle.factors import Group


def generate_in_groups(
    model: Any,
    groups: Sequence[Group],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    using: Callable[[Group, int], AbstractContextManager[None]],
    *,
    refuses: bool = False,
) -> Tensor:
    """What transformers' `generate` gives for each sample with its group's weights, in order, padded on the right.

    As in transformers, where the network only decodes, rows start with the prompts, padded on the left to the width
    that they were given in. `using`: while inside what it returns, the model has a group's weights for so many samples.
    With `refuses`, samples of no task get nothing more than their prompts.
    """
    starts_with_prompt = not model.config.is_encoder_decoder
    inputs = to_the_right_end(inputs) if starts_with_prompt else inputs
    rows: dict[int, Tensor] = {}
    for group, samples in _grouped(groups):
        given = take(inputs, samples)
        if refuses and not group:
            rows |= dict(zip(samples, _prompts(model, given, options), strict=True))
            continue
        part = _narrow(given) if "max_new_tokens" in options else given
        with using(group, len(samples)):
            made = model.generate(**part, **options)
        if starts_with_prompt and "input_ids" in given:
            each = len(made) // len(samples)
            prompts = given["input_ids"].repeat_interleave(each, 0)
            made = torch.cat([prompts, made[:, part["input_ids"].shape[1] :]], 1)
        rows |= dict(zip(samples, made.unflatten(0, (len(samples), -1)), strict=True))
    ordered = [row for sample in range(len(groups)) for row in rows[sample]]
    return nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=_padding(model))


def to_the_right_end(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with what is masked moved to the left of each row, and all else in its order."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2 or bool((mask[:, -1] != 0).all()):
        return dict(inputs)
    order = (mask != 0).int().argsort(dim=1, stable=True)
    return {
        key: value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in inputs.items()
    }


def _narrow(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without the columns at its ends that no sample uses."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return dict(inputs)
    used = (mask != 0).any(0).nonzero()
    kept = slice(int(used.min()), int(used.max()) + 1)
    return {
        key: value[:, kept] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in inputs.items()
    }


def _prompts(model: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> list[Tensor]:
    """(sequences, tokens) of each sample: its prompt, or where that is not repeated one token of padding."""
    ids = given.get("input_ids")
    starts_with_prompt = ids is not None and not model.config.is_encoder_decoder
    count = num_samples(given)
    said = ids if starts_with_prompt else torch.full((count, 1), _padding(model), device=model.device)
    assert isinstance(said, Tensor)
    return list(said[:, None].expand(-1, options.get("num_return_sequences", 1), -1))


def _grouped(groups: Sequence[Group]) -> Iterator[tuple[Group, list[int]]]:
    for group in sorted(set(groups)):
        yield group, [sample for sample, own in enumerate(groups) if own == group]


def _padding(model: Any) -> int:
    config = model.generation_config
    return next((pad for pad in (config.pad_token_id, config.eos_token_id) if isinstance(pad, int)), 0)
