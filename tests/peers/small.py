"""Small networks that run, the same to the bit with every numpy, and rows for them: for methods that need data."""

from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

try:
    from tests.peers.checkpoints import noise
except ImportError:  # a peer's script finds this folder alone
    from checkpoints import noise

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
WIDTHS = (6, 12, 10, 4)
ROWS, LENGTH = 8, 6
COSINE = 0.72
"""Between those of the matrices of a checkpoint: some have left what alignment changed, some not."""


def bert(model: str) -> BertForSequenceClassification:
    """A classifier in float64; `a` and `b` are near `base`."""
    network = BertForSequenceClassification(BertConfig(**CONFIG)).double().eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.copy_(torch.from_numpy(_weight(name, tuple(value.shape), model)))
    return network


def _weight(name: str, shape: tuple[int, ...], model: str) -> "np.ndarray":
    scale = shape[-1] ** -0.5 if len(shape) == 2 and "embed" not in name else 0.3
    start = scale * noise(f"bert/{name}", shape) + (1.0 if "LayerNorm.weight" in name else 0.0)
    change = 0.0 if model == "base" else 0.4 * scale * noise(f"bert/{model}/{name}", shape)
    return (start + change).astype(np.float32)


def rows(model: str) -> list[list[int]]:
    """Tokens of a model's rows, all of one length, so that nobody pads."""
    drawn = (noise(f"rows/{model}", (ROWS, LENGTH)) * 1e6).astype(np.int64)
    return (1 + drawn % (CONFIG["vocab_size"] - 1)).tolist()


def labels(model: str) -> list[int]:
    return [row[0] % CONFIG["num_labels"] for row in rows(model)]


def mlp(model: str) -> dict[str, torch.Tensor]:
    """Linear layers without biases, of no common start, in float32."""
    shapes = {f"layers.{i}.weight": (WIDTHS[i + 1], WIDTHS[i]) for i in range(len(WIDTHS) - 1)}
    return {
        name: torch.from_numpy((shape[1] ** -0.5 * noise(f"mlp/{model}/{name}", shape)).astype(np.float32))
        for name, shape in shapes.items()
    }


def inputs() -> torch.Tensor:
    """What goes into an MLP, in float32."""
    return torch.from_numpy(noise("mlp/inputs", (50, WIDTHS[0])).astype(np.float32))
