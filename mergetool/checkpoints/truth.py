"""The config.json of a result: that of its leader, made true for the tensors that were written.

Whatever overrides, adapters and copies did: vocabulary size, number of layers, tied words, classes and their labels,
the class of network and the storage dtype follow from what lies in the files.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergetool.checkpoints.by_layer import Taken, kind_of_attention, set_by_layer
from mergetool.checkpoints.facts import QUANTISED, SCALED_BY_TIES, parts_of
from mergetool.checkpoints.sizes import SizeChange, Sized, changed_sizes
from mergetool.checkpoints.ties import TIE_KEY, embeddings_of, is_head
from mergetool.errors import PlanError

Config = Mapping[str, Any]
Shape = tuple[int, ...]

_VOCABULARY = "vocab_size"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_TOWERS = {"decoder": ("decoder_layers", "num_decoder_layers"), "encoder": ("encoder_layers",)}
_CLASSIFIERS = re.compile(
    r"(.*\.)?(classifier|score|qa_outputs|classification_head\.out_proj|classifier\.out_proj|fc|head|logits_proj)\.weight"
)


_FURTHER = "num_nextn_predict_layers"
"""The key for layers behind the last, numbered on, that predict further tokens (DeepSeek)."""


@dataclass(frozen=True)
class Parent:
    """A model that took part: its config.json, and the shapes of its tensors under the result's names."""

    config: Config
    shapes: Mapping[str, Shape]
    described: Mapping[str, Shape]
    """Those that its config.json is about: without what adapters added."""


@dataclass(frozen=True)
class Written:
    """What a result holds."""

    shapes: Mapping[str, Shape]
    copied: Mapping[str, str] = field(default_factory=dict)
    """Whose tensors were copied as they are, by name."""
    untied: Sequence[str] = ()
    """Heads that are tensors of their own although the leader's config ties them."""
    dtype: str | None = None
    """torch's name of the storage dtype of most weights."""
    one_dtype: bool = False
    """Whether that dtype was asked for, and so holds for every part."""
    layers: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=dict)
    """Where layers were taken from, by what stands before their number: (model, layer there) for each in order."""
    special: Mapping[str, Any] = field(default_factory=dict)
    """Ids of special tokens, where the tokenizer is not the leader's or the template is not the tokenizer's."""


def true_config(leader: str, parents: Mapping[str, Parent], written: Written) -> dict[str, Any]:
    """The leader's config as the result needs it; empty where the leader has none."""
    config: dict[str, Any] = copy.deepcopy(dict(parents[leader].config))
    if not config:
        return config
    before = parents[leader].described
    for own in _parts(config):
        for key in QUANTISED:
            own.pop(key, None)
    _set_layers(config, before, written, parents)
    _set_sizes(config, leader, parents, written)
    _set_vocabulary(config, before, written.shapes)
    _set_classes(config, leader, parents, written)
    if written.untied and config.get("model_type") not in SCALED_BY_TIES:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or TIE_KEY in part):
                part[TIE_KEY] = False
    config.update({key: value for key, value in written.special.items() if key in config or value is not None})
    if written.dtype is not None:
        _set_dtype(config, written.dtype, inside=written.one_dtype)
    return config


# -------------------------------------------------------------------- vocabulary


def vocabulary_sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Rows of the matrices that have one for every token, by name."""
    return {name: shapes[name][0] for name in embeddings_of(shapes) if len(shapes[name]) == 2}


def _set_vocabulary(config: dict[str, Any], before: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> None:
    for name, rows in vocabulary_sizes(shapes).items():
        old = before[name][0] if name in before else None
        for part in _parts(config):
            if old is not None and part.get(_VOCABULARY) == old != rows:
                part[_VOCABULARY] = rows


# -------------------------------------------------------------------- other sizes


def _sizes(leader: str, parents: Mapping[str, Parent], written: Written) -> tuple[list[SizeChange], dict[str, str]]:
    known = {model: Sized(parent.config, parent.described) for model, parent in parents.items()}
    return changed_sizes(known[leader], {m: each for m, each in known.items() if m != leader}, written.shapes)


def _set_sizes(config: dict[str, Any], leader: str, parents: Mapping[str, Parent], written: Written) -> None:
    """Sizes as the parent has them whose tensors were taken."""
    try:
        changes = _sizes(leader, parents, written)[0]
    except PlanError as error:
        error.fix = "stack layers of models of one size" if written.layers else error.fix
        raise
    for change in changes:
        part, key = change.key
        (config[part] if part else config)[key] = copy.deepcopy(change.value)


def strange_sizes(leader: str, parents: Mapping[str, Parent], written: Written) -> dict[str, str]:
    """Tensors of another size than the leader's whose size no key of config.json tells, with whose they are."""
    if not parents[leader].config:
        return {}
    strange = _sizes(leader, parents, written)[1]
    counted = {*vocabulary_sizes(written.shapes), *(name for name in strange if is_classifier(name) or is_head(name))}
    return {name: model for name, model in strange.items() if name not in counted}


# -------------------------------------------------------------------- layers


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Layers by what stands before their number: the highest number and one more."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            tower = ".".join(parts[:place])
            counts[tower] = max(counts.get(tower, 0), int(parts[place]) + 1)
    return counts


TEXT_LAYERS = re.compile(
    r"((model|transformer|language_model|text_model|encoder|decoder|bert|roberta|electra|vit|deit|gpt_neox)\.)*"
    r"(layers|layer|h|block)"
)
"""Towers whose number of layers a config states."""


def _counts_layers(key: str) -> bool:
    return key == "depth" or ("layer" in key and not re.search("lstm|residual|conv|_size|_id", key))


def layer_numbers(config: Config) -> set[int]:
    """Every number of layers that a config may speak of: its own, its parts', and with what predicts further tokens."""
    counts: set[int] = set()
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        own = {value for key, value in part.items() if type(value) is int and _counts_layers(key)}
        extra = [part[key] for key in part if "nextn" in key or "mtp" in key]
        own |= {count + more for count in own for more in extra if type(more) is int}
        own |= {len(value) for value in part.values() if isinstance(value, list)} if own else set()
        counts |= own
    return counts


def _set_layers(
    config: dict[str, Any], before: Mapping[str, Shape], written: Written, parents: Mapping[str, Parent]
) -> None:
    old, new = layer_counts(before), layer_counts(written.shapes)
    if written.layers:
        _tell_both(config, old)
    for tower, count in new.items():
        if tower in written.layers and tower in old:
            _set_slices(config, tower, (old[tower], count), written.layers[tower], parents)
        elif old.get(tower, count) != count:
            part, keys = _place_of_layers(config, tower, old[tower])
            part.update(dict.fromkeys(keys, count))
            for name, values in list(part.items()) if keys else ():
                if isinstance(values, list) and len(values) == old[tower]:
                    part[name] = _list_of(name, count, values, parents)


def _tell_both(config: dict[str, Any], counts: Mapping[str, int]) -> None:
    """Have T5 count the layers of its decoder by themselves, where it says one number for both of its rows."""
    if {"encoder.block", "decoder.block"} <= counts.keys() and "num_layers" in config:
        config.setdefault("num_decoder_layers", counts["decoder.block"])


def _set_slices(
    config: dict[str, Any],
    tower: str,
    counts: tuple[int, int],
    layers: Sequence[tuple[str, int]],
    parents: Mapping[str, Parent],
) -> None:
    """Make a config true for a row whose layers were taken one by one. Raises PlanError where it has no words."""
    old, new = counts
    part, keys = _place_of_layers(config, tower, old)
    if further := layers_behind(part, old):  # no slice has them
        old -= further
        part[_FURTHER] = 0
        keys = _place_of_layers(config, tower, old)[1]
    if not keys and old != new and not any("layer" in key and len(part[key]) == old for key in _lists(part)):
        what = f"config.json does not say how many layers {tower} has, so nothing would know of {new} in place of {old}"
        raise PlanError(what, "slices", f"take {old} layers")
    own: dict[str, tuple[Mapping[str, Any], int]] = {}
    for model in {model for model, _ in layers}:
        count = layer_counts(parents[model].described).get(tower, old) - further
        theirs = copy.deepcopy(dict(parents[model].config))
        own[model] = (_place_of_layers(theirs, tower, count)[0] if theirs else copy.deepcopy(part), count)
    part.update(dict.fromkeys(keys, new))
    set_by_layer(part, [Taken(model, own[model][0], layer, own[model][1]) for model, layer in layers], old, tower)


def kinds_of_layers(config: Config, tower: str, count: int) -> list[str | None]:
    """The kind of attention of each of a row's layers, where a config tells."""
    part, keys = _place_of_layers(copy.deepcopy(dict(config)), tower, count)
    return [kind_of_attention(part, layer) if keys else None for layer in range(count)]


def layers_behind(part: Config, count: int) -> int:
    """How many of `count` numbered layers lie behind the last, and predict further tokens."""
    further = part.get(_FURTHER)
    return further if type(further) is int and part.get("num_hidden_layers") == count - further else 0


def _lists(part: Mapping[str, Any]) -> list[str]:
    return [key for key, value in part.items() if isinstance(value, list)]


def _place_of_layers(config: dict[str, Any], tower: str, count: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The part of a config that counts a tower's layers, and the keys: those whose number is right."""
    words = re.split(r"[._]", tower)
    own = tuple(key for word, keys in _TOWERS.items() if word in words for key in keys)
    for part in _parts(config, tower):
        stated = [key for key in own if key in part]
        keys = stated if "decoder" in words and stated else [*own, *_LAYERS]
        if right := tuple(key for key in keys if part.get(key) == count):
            return part, right
    return _parts(config, tower)[0], ()


def _list_of(name: str, count: int, values: list[Any], parents: Mapping[str, Parent]) -> list[Any]:
    """A list with one entry a layer: that of a parent with as many layers, else cut or gone on with as it began."""
    for parent in parents.values():
        for part in _parts(dict(parent.config)):
            if isinstance(part.get(name), list) and len(part[name]) == count:
                return list(part[name])
    return [values[layer % len(values)] for layer in range(count)]


# -------------------------------------------------------------------- classes


def is_classifier(name: str) -> bool:
    """Whether a tensor of this name has one row for every class."""
    return bool(_CLASSIFIERS.fullmatch(name)) and not any(part.isdecimal() for part in name.split("."))


def _set_classes(config: dict[str, Any], leader: str, parents: Mapping[str, Parent], written: Written) -> None:
    """The class of network that holds exactly what was written, and the labels of the classifier that is in it."""
    head = next((name for name in written.shapes if is_classifier(name)), None)
    owner = leader if head is None else written.copied.get(head, leader)
    if head is not None and head not in parents[owner].shapes:
        owner = next(model for model, parent in parents.items() if head in parent.shapes)
    exact = [model for model, parent in parents.items() if parent.shapes.keys() == written.shapes.keys()]
    named = leader if leader in exact else owner if owner in exact or head is not None else next(iter(exact), leader)
    same_type = parents[named].config.get("model_type") == config.get("model_type")
    if named != leader and same_type and "architectures" in parents[named].config:
        config["architectures"] = parents[named].config["architectures"]
    if head is not None and owner != leader:
        for key in ("id2label", "label2id", "num_labels", "problem_type"):
            config.pop(key, None)
            if key in parents[owner].config:
                config[key] = parents[owner].config[key]


# -------------------------------------------------------------------- dtype


def _set_dtype(config: dict[str, Any], dtype: str, *, inside: bool) -> None:
    """Write the dtype under the name that the config uses; `inside`: in the configs of parts (text, vision) too."""
    others = {"_class_name", "pretrained_cfg"} & config.keys()  # of diffusers and timm, which have no such key
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ([] if others else ["torch_dtype"])
    config.update(dict.fromkeys(names, dtype))
    for part in config.values() if inside else ():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            _set_dtype(part, dtype, inside=True)


def _parts(config: dict[str, Any], tower: str = "") -> list[dict[str, Any]]:
    """A config and the configs in it; those that a tower's name speaks of first."""
    inner = parts_of(config)
    words = {word for word in re.split(r"[._]", tower) if word}
    words |= {"vision"} if words & {"visual", "image", "vit"} else set()
    words |= {"text"} if "language" in words or not words & {"vision", "audio", "visual"} else set()
    ranked = sorted(inner, key=lambda key: -len(words & set(key.split("_"))))
    return [*(inner[key] for key in ranked), config] if tower else [config, *inner.values()]
