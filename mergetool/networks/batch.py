"""A small input of the kind that a network takes, to see that it runs and to trace it."""

from typing import Any

import torch

_IMAGE_SIZE = 64  # for networks that take images of any size


def small_batch(model: Any) -> dict[str, Any]:
    """One sample of the kind that a model of transformers names as its main input."""
    config, kind = model.config, model.main_input_name
    if kind == "pixel_values":
        size = getattr(config, "image_size", _IMAGE_SIZE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {kind: torch.rand(1, getattr(config, "num_channels", 3), height, width)}
    if kind == "input_features":
        length = 2 * getattr(config, "max_source_positions", 50)
        inputs = {kind: torch.rand(1, config.num_mel_bins, length)}
    elif kind == "input_values":
        inputs = {kind: torch.rand(1, 16000)}
    else:
        inputs = {kind: torch.arange(1, 7).remainder(config.get_text_config().vocab_size)[None]}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(1, 2, dtype=torch.long)
    return inputs
