"""Rows of numbered layers of a network: which there are, which is meant, and what lies before and behind them.

Most networks have one row (`model.layers`); encoder-decoders have two (`encoder.block`, `decoder.block`), and what sees
or hears has one more for that. Names tell it: a row's layers are numbered 0, 1, 2 ..., without gaps.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from mergetool.arch.ends import ends_of
from mergetool.checkpoints.truth import layer_counts
from mergetool.errors import PlanError

End = Literal["first", "last"]

_OTHER_SENSES = re.compile(r"vision|visual|image|vit|audio|speech|pixel|qformer")
_NO_ROW = re.compile(r"conv_layers|feature_extractor|mtp|projector|projection|merger|adapter|lstm|pos_conv")
"""Numbered parts that are no layers of the network's depth."""
_TEXT = ("text", "text_decoder", "language_model", "language", "text_model")
"""How people call the row that reads or writes text."""
_FIRST = re.compile(
    r"(^|[._])(embed\w*|\w+embeddings?|stem|shared|w[tp]e|rotary\w*|patch\w*|cls_token|pos_emb\w*|\w*mask_token"
    r"|tokens?_emb\w*"
    r"|pre_?la?y?e?r?_?n\w*|(ln|norm|layernorm)_pre|relative_pe|conv\d|feature_(extractor|projection)|masked_spec_embed|relative_attention_bias|rel_\w*bias\w*"
    r"|\w*projector|merger|connector|resampler|qformer|project_in|dist_token|reg_token|register_tokens)(\.|$)"
)
"""What a network begins with; all else outside the layers is what it ends with."""
_LAST = re.compile(r"(^|[._])(embed_out|vocab_projector|vocab_transform|lm_head|predictions)(\.|$)")
"""What it ends with, although it sounds like a beginning."""
_OF_FIRST = re.compile(r"(.*\.)?(relative_attention_bias|global_relative_attention_bias|rel_attn_embed)\..*")
"""What the first layer holds for all layers of its row."""


def rows_of(names: Collection[str]) -> dict[str, int]:
    """Number of layers by what stands before their number; rows of several layers, where there are any."""
    counts = layer_counts(names)
    numbers: dict[str, set[int]] = {}
    for name in names:
        tower, number = _place(name)
        if number is not None:
            numbers.setdefault(tower, set()).add(number)
    whole = {t: n for t, n in counts.items() if len(numbers[t]) == n and not _NO_ROW.search(t)}
    return {tower: count for tower, count in whole.items() if count > 1} or whole


def _place(name: str) -> tuple[str, int | None]:
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return (name, None) if place is None else (".".join(parts[:place]), int(parts[place]))


def chosen_row(rows: Collection[str], key: str = "") -> str:
    """The row that `key` names (a word of its name is enough), or the one that writes text. Raises PlanError."""
    fitting = _named(rows, key) if key else _default(rows)
    if len(fitting) == 1:
        return fitting[0]
    where = f"slices: {key}" if key else "slices"
    told = ", ".join(sorted(fitting or rows)) or "none"
    what = f"{key!r} fits {len(fitting)} of the rows of numbered layers" if key else "no row of layers is the one"
    fix = f"name one: slices: {{{sorted(rows)[0]}: [...]}}" if rows else "merge such networks without slices"
    raise PlanError(f"{what}; here are: {told}", where, fix)


def _named(rows: Collection[str], key: str) -> list[str]:
    if key in rows:
        return [key]
    fitting = [row for row in rows if key in row.split(".")] or [row for row in rows if _words(key) <= _words(row)]
    return fitting if len(fitting) == 1 or key not in _TEXT else _default(rows)


def _words(text: str) -> set[str]:
    return {word for word in re.split(r"[._]", text) if word}


def _default(rows: Collection[str]) -> list[str]:
    """The rows that may be meant where none is named: what reads text, of an encoder and a decoder the decoder."""
    text = [row for row in rows if not _OTHER_SENSES.search(row)] or list(rows)
    decoders = [row for row in text if "decoder" in row.split(".")]
    if len(decoders) == 1 and all("encoder" in _words(row) or row in decoders for row in text):
        return decoders
    short = [row for row in text if row.rpartition(".")[2] in ("layers", "layer", "h", "block", "blocks")]
    return text if len(text) == 1 else short or text


class Outside:
    """What does not belong to the sliced rows: to which of them each tensor goes, and to which end."""

    def __init__(self, sliced: Iterable[str], rows: Collection[str], shapes: Mapping[str, tuple[int, ...]], kind: str):
        every = sorted({*rows, *sliced})
        text = _default(every)
        self._sliced = sorted(sliced, key=lambda row: row in text)  # what reads text is what the network ends with
        self._parts = {row: _part(row, every) for row in every}
        self._known = ends_of(shapes, kind)

    def of(self, name: str) -> tuple[str, End] | None:
        """(row, end) of a tensor; None for one that is inside the layers."""
        if any(name.startswith(f"{row}.") for row in self._sliced):
            return None
        owner = next((row for row, part in self._parts.items() if part and name.startswith(f"{part}.")), None)
        if owner is not None and owner not in self._sliced:
            end: End = "last" if "decoder" in self._parts[owner].split(".") else "first"
        else:
            first = _FIRST.search(name) and not _LAST.search(name)
            end = self._known.get(name) or ("first" if first else "last")
        return (owner if owner in self._sliced else self._sliced[0 if end == "first" else -1]), end


def _part(row: str, rows: Collection[str]) -> str:
    """The part of the network that a row is of: as much of its name as sets it apart; nothing for an only row."""
    words = row.split(".")
    others = [other.split(".") for other in rows if other != row]
    lengths = range(1, len(words) + 1)
    return ".".join(words[: next(n for n in lengths if all(o[:n] != words[:n] for o in others))]) if others else ""


def layers_of(names: Iterable[str], tower: str) -> dict[int, dict[str, str]]:
    """The tensors of each layer of a row, by what stands behind the layer's number."""
    layers: dict[int, dict[str, str]] = {}
    for name in names:
        if name.startswith(f"{tower}."):
            number, _, suffix = name.removeprefix(f"{tower}.").partition(".")
            if number.isdecimal():
                layers.setdefault(int(number), {})[suffix] = name
    return layers


def of_first_layer(layers: Mapping[int, Mapping[str, str]]) -> set[str]:
    """What only the first layer of a row holds, for all of them (T5's table of relative positions)."""
    others = {suffix for number, own in layers.items() if number for suffix in own}
    return {suffix for suffix in layers.get(0, {}) if _OF_FIRST.fullmatch(suffix) and suffix not in others}


def norms_not_in_first(layers: Mapping[int, Mapping[str, str]]) -> set[str]:
    """Norms of all layers but the first, which such a network has not (ModernBERT's first follows on another norm)."""
    others = [set(own) for number, own in layers.items() if number]
    shared = set.intersection(*others) if others else set()
    return {suffix for suffix in shared - layers.get(0, {}).keys() if "norm" in suffix}
