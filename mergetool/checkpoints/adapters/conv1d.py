"""Which layers store their weight transposed: transformers' `Conv1D`, in GPT-2 and what descends from it.

PEFT writes one `fan_in_fan_out` for all layers of an adapter and corrects it in memory, layer by layer, by class. The
flag in the file is the one of the layer that came last, so it decides only where neither the architecture nor the
shapes do.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_LEAVES: Mapping[str, frozenset[str]] = {
    "gpt2": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
    "imagegpt": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "decision_transformer": frozenset({"c_attn", "q_attn", "c_proj", "c_fc"}),
    "clvp_decoder": frozenset({"c_fc", "c_proj"}),
}
"""Names of Conv1D layers, by model type."""


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model type of a config, and of the models that it is made of."""
    if isinstance(own := config.get("model_type"), str):
        yield own
    for part in config.values():
        if isinstance(part, dict):
            yield from model_types(part)


def is_transposed(
    module: str, product: tuple[int, int], stored: tuple[int, ...], config: Mapping[str, Any], *, flag: bool
) -> bool:
    """Whether the weight of `module` is stored as (in, out). `product` is (out, in)."""
    fits, fits_transposed = stored == product, stored == product[::-1]
    if fits != fits_transposed:
        return fits_transposed
    types = set(model_types(config))
    leaf = module.rpartition(".")[2]
    if types and "auto_map" not in config:
        return any(leaf in _LEAVES.get(kind, ()) for kind in types)
    return flag
