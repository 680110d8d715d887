"""What config.json files say about the meaning of the weights, and where those of several models disagree.

Two models whose tensors have the same shapes may still compute different things with them: other rotary positions,
another activation, another number of heads. Only keys that both state are compared, except for those whose absence has
a meaning; what concerns training, generation or the writer of the file is not.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from typing import Any

from mergetool.checkpoints.ties import TIE_KEY

Config = Mapping[str, Any]

_HARMLESS = """
    architectures _* *dtype transformers_version *_version use_cache auto_map unsloth* id2label label2id
    num_labels problem_type finetuning_task task_specific_params classifier_* *dropout* *_pdrop *drop_rate
    layerdrop *_layerdrop init* *_init *_init_value *_token_id *_token_index vocab_size max_position_embeddings
    n_positions n_ctx max_length min_length tie_* gradient_checkpointing output_* return_dict* torchscript
    pruned_heads chunk_size_feed_forward do_sample temperature top_k top_p num_beams *_penalty
    *attn_implementation summary_* quantization_config compression_config mask_* router_aux_loss_coef
    output_router_logits pretraining_tp max_window_layers apply_spec_augment pad_vocab_size* *_loss*
    use_bfloat16
"""
_IGNORED = tuple(_HARMLESS.split())
"""Keys that tell of training, of generation, of the file, or what is told elsewhere."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "n_head_kv", "head_dim")
"""Where one weight is cut into heads: a mean of two cuts is nothing."""
_LAYER_COUNTS = ("*num_hidden_layers", "n_layer", "n_layers", "num_layers", "*coder_layers", "*_layers")
SCALED_BY_TIES = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "t5gemma", "udop", "pop2piano")
"""Model types that read `tie_word_embeddings` as a factor of the logits, and tie by values whatever it says."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Sections about codes: how weights are, or were, quantised."""
_NONE_COUNTS = ("sliding_window",)
"""Keys whose null is as much a value as any other."""
_DEFAULTS = {"rope_theta": 10000.0}
"""What the absence of a key means."""


@dataclass(frozen=True)
class Disagreement:
    """A key of config.json on which a model and its leader differ."""

    key: str
    values: tuple[Any, Any]
    """What the leader says, and what the model says."""

    @property
    def cuts_heads(self) -> bool:
        """Whether merging by shape would mix different heads."""
        return self.key.rpartition(".")[2] in _HEADS


def disagreements(leader: Config, other: Config) -> list[Disagreement]:
    """Where two configs give weights of one shape two meanings, in the leader's order. Nothing if one is empty."""
    if not leader or not other:
        return []
    ours, theirs = _flat(leader, other), _flat(other, leader)
    keys = [key for key in {**ours, **_DEFAULTS} if key in ours or key in theirs]
    differing = [Disagreement(key, (ours.get(key, _default(key)), theirs.get(key, _default(key)))) for key in keys]
    return [each for each in differing if None not in each.values and not _equal(*each.values)]


def _is_list_of_layers(one: Any, other: Any) -> bool:
    """Whether two values are lists with one entry a layer, of networks of unequal depth: that is told elsewhere."""
    return isinstance(one, list) and isinstance(other, list) and len(one) != len(other)


def _default(key: str) -> Any:
    return _DEFAULTS.get(key)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        try:
            return abs(float(one) - float(other)) <= 1e-6 * abs(float(one))
        except (TypeError, ValueError):
            return False
    return bool(one == other) or _is_list_of_layers(one, other)


def _flat(config: Config, other: Config) -> dict[str, Any]:
    """The keys that count, those of parts as `text_config.key`; of the text alone, where the other has nothing else."""
    if "text_config" in config and "text_config" not in other:
        config = config["text_config"] if isinstance(config["text_config"], dict) else config
    return dict(_pairs(config, ""))


def _pairs(config: Config, prefix: str) -> Iterator[tuple[str, Any]]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = config.get("rope_theta", rope.pop("rope_theta", None))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if theta is not None:
        yield f"{prefix}rope_theta", theta
    if kind != "default" or rope:
        yield f"{prefix}rope_scaling", {"rope_type": kind, **rope}
    elif theta is not None:
        yield f"{prefix}rope_scaling", {"rope_type": "default"}
    inner = parts_of(config)
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling", "rope_theta") or _is_ignored(key, config):
            continue
        if key in inner:
            yield from _pairs(inner[key], f"{prefix}{key}.")
        elif value is not None or key in _NONE_COUNTS:
            yield f"{prefix}{key}", "none" if value is None else value


def _is_ignored(key: str, config: Config) -> bool:
    if key == TIE_KEY and config.get("model_type") in SCALED_BY_TIES:
        return False
    if key == "sliding_window" and config.get("use_sliding_window") is False:
        return True
    return _ignored().fullmatch(key) is not None


@cache
def _ignored() -> re.Pattern[str]:
    return re.compile("|".join(map(translate, (*_IGNORED, *_LAYER_COUNTS))))


def parts_of(config: Config) -> dict[str, dict[str, Any]]:
    """The configs inside a config (text, vision ...), by key."""
    return {key: part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict)}


def name_of(config: Config) -> str:
    """What a config calls its network: the class, and the model type."""
    names = config.get("architectures")
    kind = str(config.get("model_type") or "")
    if not isinstance(names, list) or not names:
        return kind
    return f"{names[0]} ({kind})" if kind else str(names[0])
