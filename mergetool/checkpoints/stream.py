"""What writes into the stream of hidden states, by the type of network: the last matrix of each part of a layer.

Where norms stand before the parts, and one at the end (pre-norm), a layer sees the stream only through norms, which
take its scale away. So a stream that is `s` times as large from some layer on gives the same as one whose later layers
write `1 / s` times as much, up to the norms' epsilon. That can be said in weights: a factor on these tensors.

Networks whose norms stand behind the parts (BERT, Gemma 2, OLMo 2) are not among these.
"""

from collections.abc import Mapping
from typing import Any

_LLAMA = ("*.self_attn.o_proj.*", "*.mlp.down_proj.*")
_NEOX = ("*.attention.dense.*", "*.mlp.dense_4h_to_h.*")
_WRITERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite", "stablelm"), _LLAMA),
    "starcoder2": ("*.self_attn.o_proj.*", "*.mlp.c_proj.*"),
    "phi": ("*.self_attn.dense.*", "*.mlp.fc2.*"),
    "gpt2": ("*.attn.c_proj.*", "*.mlp.c_proj.*"),
    "gpt_neo": ("*.attn.attention.out_proj.*", "*.mlp.c_proj.*"),
    "gptj": ("*.attn.out_proj.*", "*.mlp.fc_out.*"),
    "gpt_neox": _NEOX,
}
KNOWN = tuple(_WRITERS)
"""Model types whose writers are known."""


def writers_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Globs of the tensors, weights and biases, that write into the stream; None where that is not known."""
    return _WRITERS.get(str(config.get("model_type")))
