"""Which tensors are weight matrices: maps between feature spaces, whose singular vectors mean directions of features.

An embedding table is two-dimensional too, but its rows are tokens. Methods that work on singular vectors merge
matrices by them and average everything else. Authors draw the line differently, hence the named filters.
"""

import re
from typing import Literal

MatrixFilter = Literal["llm", "reference", "fusionbench", "none"]

_NOT_MATRICES = {
    "llm": re.compile(
        r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|\w*router|(shared_expert_)?gate|rotary\w*|relative_attention_bias)(\.|$)"
        r"|^(\w+\.)?shared\.|^output\.weight$"
    ),
    "reference": re.compile("text_projection"),
    "fusionbench": re.compile(r"$^"),
    "none": re.compile(""),
}

_ATTENTION_OUTPUT = re.compile(
    r"(attention\.output\.dense|self_attention\.dense|attention\.dense|o_proj|out_proj|out_lin|attn\.c_proj|attn\.proj"
    r"|attention\.(wo|o_proj)|(SelfAttention|attn)\.o)\.weight$"
)

_MLP = re.compile(
    r"(^|\.)(mlp|feed_forward|ffn|DenseReluDense|intermediate|fc1|fc2|lin1|lin2|ff|feedforward)\."
    r"|(?<!attention)\.output\.dense\."
)

_QKV = (
    "query key value",
    "q_proj k_proj v_proj",
    "q_lin k_lin v_lin",
    "query_proj key_proj value_proj",
    "to_q to_k to_v",
    "wq wk wv",
    "q k v",
)


def query_key_value(name: str) -> tuple[str, ...]:
    """The weights that read what this one reads: query, key and value of its attention block; itself is among them.

    Empty for a tensor of another kind, and where they are stored as one tensor anyway.
    """
    before, _, rest = name.removesuffix(".weight").rpartition(".")
    for words in _QKV:
        if rest in words.split() and name.endswith(".weight"):
            return tuple(f"{before}.{word}.weight".lstrip(".") for word in words.split())
    return ()


def is_attention_output(name: str) -> bool:
    """Whether a tensor is the projection that an attention block ends with (as transformers, timm and T5 call it)."""
    return _ATTENTION_OUTPUT.search(name) is not None


def is_of_mlp(name: str) -> bool:
    """Whether a tensor is of the part of a layer that sees one token at a time (as transformers calls it)."""
    return _MLP.search(name) is not None


def is_matrix(name: str, shape: tuple[int, ...], kept: MatrixFilter, *, conv: Literal["mean", "matricize"]) -> bool:
    """Whether a tensor is a weight matrix under a filter; `conv` says so of tensors with more than two axes.

    llm: two axes, but no embedding, output head, router gate or rotary table. reference (the TSV authors' code): two
    axes, but no `text_projection`. fusionbench: two axes. none: never.
    """
    if len(shape) < 2 or (len(shape) > 2 and conv == "mean"):
        return False
    return not _NOT_MATRICES[kept].search(name)
