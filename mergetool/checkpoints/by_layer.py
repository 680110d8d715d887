"""What config.json says of single layers, made true for layers that were cut, stacked or put in another order.

Most networks are the same in every layer. Some say by a list, by numbers of layers or by a rule on these numbers which
layers look at a window only, have experts, or are of another kind altogether: the layer that was taken from place 7 of
a model must be of that kind wherever it lies now. What a config has no words for is refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergetool.errors import PlanError

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Taken:
    """Where a layer of the result comes from: the part of its model's config about this row, and the layer there."""

    model: str
    part: Part
    layer: int
    count: int
    """How many layers the row has in that model."""


_NO_LIST = re.compile(r"token_id|architectures|_index$|labels?$|pinpoints|languages|scales?$|factor|limit")
"""Lists that are not by layer, however long they are."""
_NUMBERS: tuple[str, ...] = (
    "mlp_only_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "moe_layers",
    "hybrid_layer_ids",
)
_NUMBERS += ("cross_attention_layers", "deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes")
"""Lists of the numbers of layers."""
_SHARED = ("num_kv_shared_layers", "hidden_size_per_layer_input")
"""Signs of what layers share: keys and values, one matrix of embeddings for all of them (Gemma 3n)."""
_BY_NUMBER = ("scale_attn_by_inverse_layer_idx",)
"""Switches for arithmetic with the layer's own number."""
_SLIDING, _FULL = "sliding_attention", "full_attention"

_RULES: dict[str, Callable[[Part, int], Any]] = {
    "attn_layer_period": lambda part, i: i % part["attn_layer_period"] == part.get("attn_layer_offset", 0),
    "expert_layer_period": lambda part, i: i % part["expert_layer_period"] == part.get("expert_layer_offset", 0),
    "moe_layer_freq": lambda part, i: i < part.get("first_k_dense_replace", 0) or i % part["moe_layer_freq"] == 0,
    "global_attn_every_n_layers": lambda part, i: i % part["global_attn_every_n_layers"] == 0,
    "interleave_moe_layer_step": lambda part, i: (i + 1) % part["interleave_moe_layer_step"] == 0,
    "full_attention_interval": lambda part, i: (i + 1) % part["full_attention_interval"] == 0,
}
"""Rules on a layer's number that hold where no list says more, and have no other words."""
_SAID_BY = {
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "full_attention_interval": "layer_types",
}
"""The list that says the same as a rule, and goes before it."""


def set_by_layer(part: dict[str, Any], taken: Sequence[Taken], count: int, tower: str) -> None:
    """Make a part of a config true for a row of `taken` layers, where it had `count`. Raises PlanError."""
    if all(each.layer == place for place, each in enumerate(taken)) and len(taken) == count:
        _set_lists(part, taken, count)
        return
    _refuse(part, taken, tower)
    _set_kinds(part, taken)
    _set_dense(part, taken, tower)
    _set_numbers(part, taken)
    _set_lists(part, taken, count)
    _set_patterns(part, taken)
    _check_rules(part, taken, tower)


def _refuse(part: Part, taken: Sequence[Taken], tower: str) -> None:
    for key in (*_SHARED, *_BY_NUMBER):
        if any(each.part.get(key) for each in taken) or part.get(key):
            what = f"layers of {tower} depend on their place ({key}: {part.get(key)}), so they mean nothing elsewhere"
            raise PlanError(what, "slices", "merge such networks without slices")


# -------------------------------------------------------------------- kinds of attention


def kind_of_attention(part: Part, layer: int) -> str | None:
    """The kind of attention of a layer, where a config tells."""
    listed = part.get("layer_types")
    if isinstance(listed, list):
        return str(listed[layer]) if layer < len(listed) else None
    pattern = part.get("sliding_window_pattern", part.get("_sliding_window_pattern"))
    if isinstance(pattern, str) and pattern:
        return _SLIDING if pattern[layer % len(pattern)] == "L" else _FULL
    if part.get("model_type") in ("gemma2", "gpt_oss"):
        pattern = 2
    elif part.get("model_type") in ("gemma3", "gemma3_text"):
        pattern = pattern or 6
    elif part.get("model_type") == "cohere2":
        pattern = pattern or 4
    if type(pattern) is int and pattern > 0:
        return _SLIDING if (layer + 1) % pattern else _FULL
    if part.get("use_sliding_window") and type(part.get("max_window_layers")) is int:
        return _SLIDING if layer >= part["max_window_layers"] else _FULL
    return None


def _set_kinds(part: dict[str, Any], taken: Sequence[Taken]) -> None:
    kinds = [kind_of_attention(each.part, each.layer) for each in taken]
    decided = [kind or kind_of_attention(part, each.layer) for kind, each in zip(kinds, taken, strict=True)]
    if not all(decided):
        return
    said = {key: value for key, value in part.items() if key != "layer_types"}
    if "layer_types" not in part and [kind_of_attention(said, place) for place in range(len(taken))] == decided:
        return
    part["layer_types"] = decided
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        part.pop(key, None)


# -------------------------------------------------------------------- layers without experts


def _is_dense(part: Part, layer: int) -> bool:
    step, first = part.get("decoder_sparse_step"), part.get("first_k_dense_replace")
    if type(step) is int:
        return layer in (part.get("mlp_only_layers") or ()) or step < 1 or (layer + 1) % step != 0
    return type(first) is int and layer < first


def _set_dense(part: dict[str, Any], taken: Sequence[Taken], tower: str) -> None:
    if not {"decoder_sparse_step", "first_k_dense_replace"} & part.keys():
        return
    dense = [place for place, each in enumerate(taken) if _is_dense(each.part or part, each.layer)]
    if "decoder_sparse_step" in part:
        part["decoder_sparse_step"], part["mlp_only_layers"] = 1, dense
        return
    if dense != list(range(len(dense))):
        place = next(place for number, place in enumerate(dense) if number != place)
        here = f"layer {place} of {tower} (layer {taken[place].layer} of {taken[place].model})"
        what = (
            f"{here} has no experts, though one below it has: first_k_dense_replace can only speak of the first layers"
        )
        raise PlanError(what, "slices", "put the layers without experts first")
    part["first_k_dense_replace"] = len(dense)


# -------------------------------------------------------------------- lists


def _set_numbers(part: dict[str, Any], taken: Sequence[Taken]) -> None:
    for key in _NUMBERS:
        if isinstance(part.get(key), list) and key != "mlp_only_layers":
            own = [listed if (listed := _list_in(each.part, key)) is not None else part[key] for each in taken]
            part[key] = [place for place, each in enumerate(taken) if each.layer in own[place]]


def _list_in(part: Part, key: str) -> list[Any] | None:
    return part[key] if isinstance(part.get(key), list) else None


def _set_lists(part: dict[str, Any], taken: Sequence[Taken], count: int) -> None:
    """Lists with one entry a layer: each as the model has it that the layer was taken from, else as the leader."""
    for key, values in list(part.items()):
        if not isinstance(values, list) or key in (*_NUMBERS, "layer_types", "attention_types"):
            continue
        if len(values) == count and not _NO_LIST.search(key):
            part[key] = [_entry(each, key, values) for each in taken]
    if "attention_types" in part and isinstance(part.get("attention_layers"), list):  # GPT-Neo counts the former
        part["attention_types"] = [[[kind], 1] for kind in part["attention_layers"]]


def _entry(each: Taken, key: str, values: list[Any]) -> Any:
    own = each.part.get(key)
    entries = own if isinstance(own, list) and each.layer < len(own) else values
    return entries[each.layer % len(entries)]


def _set_patterns(part: dict[str, Any], taken: Sequence[Taken]) -> None:
    """One letter for each layer (Nemotron-H)."""
    values = part.get("hybrid_override_pattern")
    if isinstance(values, str) and values:
        own = [each.part.get("hybrid_override_pattern") or values for each in taken]
        part["hybrid_override_pattern"] = "".join(o[each.layer] for o, each in zip(own, taken, strict=True))


def _check_rules(part: Part, taken: Sequence[Taken], tower: str) -> None:
    for key, rule in _RULES.items():
        if type(part.get(key)) is not int or part[key] < 1 or isinstance(part.get(_SAID_BY.get(key, "")), list):
            continue
        for place, each in enumerate(taken):
            own = each.part if type(each.part.get(key)) is int else part
            if rule(own, each.layer) != rule(part, place):
                what = (
                    f"layer {place} of {tower} is layer {each.layer} of {each.model}, which is of another kind than "
                    f"config.json makes of a layer {place} ({key}: {part[key]})"
                )
                raise PlanError(what, "slices", f"take layers whose numbers keep their step: multiples of {part[key]}")
