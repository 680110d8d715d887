"""Checkpoints of one network with several vocabularies, the same to the bit with every numpy."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

try:
    from tests.peers.checkpoints import HIDDEN, noise, shapes, tensors
except ImportError:  # where mergekit runs, these two files lie alone
    from checkpoints import HIDDEN, noise, shapes, tensors

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
SPECIAL = ["<unk>", "<s>", "</s>"]
SHARED = [f"w{number}" for number in range(17)]
TOKENS = {
    "base": [*SPECIAL, *SHARED],
    "a": [*SPECIAL, *SHARED[::-1], "tool", "both", "end", "mine"],
    "b": [*SPECIAL[::-1], "both", *SHARED[5:], "tool", "yours", "other"],
    "plain": [*SPECIAL, *SHARED, "<|im_start|>"],
}
"""Tokens by number: the base's, others in another order with more, and one that adds to the base's."""


def write_vocabularies(folder: Path) -> None:
    """Write `folder/<model>/` with weights, config and tokenizer."""
    for model, tokens in TOKENS.items():
        place = folder / model
        place.mkdir(parents=True)
        state = tensors("llama", {"plain": "c"}.get(model, model))
        for name in ROWS:
            state[name] = noise(f"{model}/{name}", (len(tokens), HIDDEN)).astype(np.float32)
        save_file(state, place / "model.safetensors", {"format": "pt"})
        _write_beside(place, _config(len(tokens)), tokens)


GIVEN = {
    "model": (96, [*SPECIAL, *(f"w{n}" for n in range(140))]),
    "donor": (128, [*SPECIAL, *(f"w{n}" for n in range(169, 9, -1))]),
}
"""Width and tokens of a model that gets another's tokenizer, and of the other: 130 words are shared, 30 are new."""


def write_transplant(folder: Path) -> None:
    """Write `folder/model/` and `folder/donor/`, of one layer."""
    for model, (width, tokens) in GIVEN.items():
        place = folder / model
        place.mkdir(parents=True)
        names = {name: len(shape) for name, shape in shapes("llama").items() if ".1." not in name and ".2." not in name}
        state = {name: np.ones([width] * axes, np.float32) for name, axes in names.items()}
        for name in ROWS:
            state[name] = noise(f"{model}/{name}", (len(tokens), width)).astype(np.float32)
        save_file(state, place / "model.safetensors", {"format": "pt"})
        layers = {"num_hidden_layers": 1, "num_key_value_heads": 4, "intermediate_size": width, "hidden_size": width}
        _write_beside(place, {**_config(len(tokens)), **layers}, tokens)


def by_token(folder: Path, read: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of a merged checkpoint in the order of the tokens' texts, then those without a token."""
    content = json.loads((folder / "tokenizer.json").read_text())
    numbers = {each["content"]: each["id"] for each in content["added_tokens"]} | content["model"]["vocab"]
    order = [numbers[token] for token in sorted(numbers)]
    rest = sorted(set(range(len(read[ROWS[0]]))) - set(order))
    return {name: read[name][[*order, *rest]] for name in ROWS}


def _write_beside(place: Path, config: dict[str, object], tokens: list[str]) -> None:
    _write(place / "config.json", config)
    _write(place / "tokenizer.json", _tokenizer(tokens))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _write(place / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def _config(size: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": size,
    }


def _tokenizer(tokens: list[str]) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": token, **flags} for n, token in enumerate(tokens) if token in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {token: n for n, token in enumerate(tokens)}, "unk_token": "<unk>"},
    }


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1))
