"""Does config.json speak of the tensors that lie beside it? Told from names and shapes alone, without transformers.

Every network has its own ways, so a number is called wrong only where nothing in the config accounts for it: what is
found is what a merge can do to a checkpoint (rows added or lost, layers cut, heads forgotten), not every mistake.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mergetool.checkpoints.facts import SCALED_BY_TIES
from mergetool.checkpoints.ties import TIE_KEY, holds_the_same, is_head, twin_of
from mergetool.checkpoints.truth import (
    TEXT_LAYERS,
    is_classifier,
    layer_counts,
    layer_numbers,
    vocabulary_sizes,
)
from mergetool.checkpoints.vocabulary import small_json, tokens_of
from mergetool.tensors.side_files import GENERATION_NAME
from mergetool.tensors.source import ModelSource

Config = Mapping[str, Any]
Shape = tuple[int, ...]

_MORE_ROWS = {"mllama": 8, "mllama_text_model": 8}
"""Model types whose embeddings have more rows than vocab_size says, by how many."""
_OWN_WAYS = frozenset({"moshi", "moshi_depth", "molmo2", "molmo2_text", "csm", "kyutai_speech_to_text", "dory"})
"""Model types whose tables of tokens, or layers, follow from several numbers."""
_LABELLED = re.compile(r".*For(Sequence|Token|Image|Audio|Video)Classification")
_SPEAKS = re.compile(r".*(ForCausalLM|LMHeadModel)")
_PLACEHOLDER = re.compile(
    r"<.*(image|audio|video|vision|img|pad|unused|reserved|extra).*>|\[.*(unused|IMG).*\]", re.IGNORECASE
)
"""Tokens that processors replace, or that nobody uses."""
_LAYER_LISTS = re.compile(r"(.*_)?layer_types|layers_block_type|no_rope_layers")
_SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")


@cache
def _stock_ids() -> dict[int, list[str]]:
    import yaml

    text = (files("mergetool.checkpoints") / "special_ids.yaml").read_text("utf-8")
    return {number: types.split() for number, types in yaml.safe_load(text).items()}


def disagreements_with_files(source: ModelSource, config: Config) -> Iterator[str]:
    """Where a config says something else than names and shapes, or the tokenizer beside it does."""
    if not config or config.get("model_type") in _OWN_WAYS:
        return
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    yield from _vocabulary(config, shapes)
    yield from _width(config, shapes)
    yield from _layers(config, shapes)
    yield from _layer_lists(config)
    yield from _heads(config, shapes)
    yield from _ties(source, config)
    yield from _labels(config, shapes)
    if rows := max(vocabulary_sizes(shapes).values(), default=0):
        yield from _special_tokens(config, source.folder, rows)
        yield from _tokens(source.folder, rows)


def _vocabulary(config: Config, shapes: Mapping[str, Shape]) -> Iterator[str]:
    told = sorted({value for key, value in _numbers(config) if key.endswith(("vocab_size", "vocab_sizes"))})
    more = _MORE_ROWS.get(str(config.get("model_type")), 0)
    rows = vocabulary_sizes(shapes)
    for name, count in {**rows, **_head_sizes(shapes)}.items() if told and rows else ():
        if count not in told and count - more not in told:
            yield f"{name} has {count} rows, vocab_size is {' or '.join(map(str, told))}"


def _head_sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Rows of what gives every token a score; projections inside of a network are called alike."""
    sizes = {name: shape[0] for name, shape in shapes.items() if is_head(name) and len(shape) == 2}
    inside = re.compile(r".*(\d|\.proj_out\.).*")
    return {name: rows for name, rows in sizes.items() if not inside.fullmatch(name)}


def _width(config: Config, shapes: Mapping[str, Shape]) -> Iterator[str]:
    told = {value for _, value in _numbers(config)}
    width = next((config[key] for key in ("hidden_size", "d_model", "n_embd", "dim") if config.get(key)), None)
    for name in vocabulary_sizes(shapes):
        if width is not None and shapes[name][1] not in told:
            yield f"{name} is {shapes[name][1]} wide, and hidden_size is {width}"


def _layers(config: Config, shapes: Mapping[str, Shape]) -> Iterator[str]:
    told = layer_numbers(config)
    counts = layer_counts(shapes)
    for tower, count in counts.items():
        if not told or not TEXT_LAYERS.fullmatch(tower) or any(name.startswith(f"{tower}.0.conv") for name in shapes):
            continue
        if count not in told:
            yield f"there are {count} layers under {tower}, config.json counts {' or '.join(map(str, sorted(told)))}"
        held = {int(name[len(tower) + 1 :].split(".")[0]) for name in shapes if name.startswith(f"{tower}.")}
        if absent := sorted(set(range(count)) - held):
            yield f"layer {absent[0]} is missing under {tower}, which has {count}"


def _layer_lists(config: Config) -> Iterator[str]:
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        count = part.get("num_hidden_layers")
        for key, value in part.items() if isinstance(count, int) else ():
            if _LAYER_LISTS.fullmatch(key) and isinstance(value, list) and len(value) != count:
                yield f"{key} lists {len(value)} layers, num_hidden_layers is {count}"


def _heads(config: Config, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """A language model that is not tied, and without a matrix for its answers."""
    rows = vocabulary_sizes(shapes)
    if not rows or not _SPEAKS.fullmatch(_architecture(config)) or _tied(config) is not False:
        return
    other = [
        name for name, shape in shapes.items() if name not in rows and len(shape) == 2 and shape[0] in rows.values()
    ]
    if not other and config.get("model_type") not in (*SCALED_BY_TIES, *_MORE_ROWS):
        yield f"{TIE_KEY} is false, but there is no head beside {next(iter(rows))}"


def _ties(source: ModelSource, config: Config) -> Iterator[str]:
    """A head that is stored, and differs from the embeddings that it is said to be."""
    if _tied(config) is not True or config.get("model_type") in SCALED_BY_TIES:
        return
    for name in source.specs:
        target = twin_of(name, source.specs, config) if is_head(name) else None
        if target is not None and not holds_the_same(source, name, target, whole=False):
            yield f"{TIE_KEY} is true, but {name} is another matrix than {target}"


def _tied(config: Config) -> Any:
    """What a config says of ties, if it does and in one voice."""
    text = config.get("text_config")
    told = {part[TIE_KEY] for part in (config, text) if isinstance(part, dict) and isinstance(part.get(TIE_KEY), bool)}
    return told.pop() if len(told) == 1 else None


def _labels(config: Config, shapes: Mapping[str, Shape]) -> Iterator[str]:
    labels = config.get("id2label")
    told = len(labels) if isinstance(labels, dict) else config.get("num_labels")
    if not isinstance(told, int) or not _LABELLED.fullmatch(_architecture(config)):
        return
    for name, shape in shapes.items():
        if is_classifier(name) and len(shape) == 2 and shape[0] != told:
            yield f"{name} has {shape[0]} rows, for {told} labels"


# -------------------------------------------------------------------- tokens


def _special_tokens(config: Config, folder: Path | None, rows: int) -> Iterator[str]:
    generation = {} if folder is None else small_json(folder / GENERATION_NAME)
    text = config.get("text_config")
    parts = (("", config), ("text_config.", text), (f"{GENERATION_NAME}: ", generation))
    types = {part.get("model_type") for _, part in parts if isinstance(part, Mapping)}
    for where, part in parts:
        for key in _SPECIAL if isinstance(part, Mapping) else ():
            ids = part.get(key) if isinstance(part, Mapping) else None
            for number in ids if isinstance(ids, list) else [ids]:
                if isinstance(number, int) and number >= rows and not types & set(_stock_ids().get(number, ())):
                    yield f"{where}{key} is {number}, the embeddings have {rows} rows"


def _tokens(folder: Path | None, rows: int) -> Iterator[str]:
    beyond = {place: token for place, token in (tokens_of(folder) or {}).items() if place >= rows}
    numbers = sorted(place for place, token in beyond.items() if not _PLACEHOLDER.fullmatch(token))
    if numbers:
        more = f" (and {len(numbers) - 1} more)" if len(numbers) > 1 else ""
        yield f"the tokenizer has {beyond[numbers[-1]]!r} as token {numbers[-1]}{more}, the embeddings have {rows} rows"


# -------------------------------------------------------------------- reading configs


def _architecture(config: Config) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers in a config, with the keys that they stand under."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, str(name))
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, key)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield key, config
