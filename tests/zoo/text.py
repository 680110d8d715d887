"""A real tokenizer of a few words, and sentence-transformers folders."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def token_list(count: int = 64) -> list[str]:
    """Tokens by id: the special ones, then made-up words."""
    return [*SPECIAL.values(), *(f"w{index}" for index in range(count - len(SPECIAL)))]


def save_tokenizer(folder: Path, tokens: Sequence[str] | None = None, **settings: object) -> Path:
    """Write a fast tokenizer with these tokens into `folder`, as transformers writes it."""
    vocabulary = {token: index for index, token in enumerate(tokens or token_list())}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    special = {key: token for key, token in SPECIAL.items() if token in vocabulary}
    PreTrainedTokenizerFast(tokenizer_object=made, **{**special, **settings}).save_pretrained(folder)
    return folder


def as_sentence_model(folder: Path, seed: int, *, width: int = 16, dense: int = 8) -> Path:
    """Make a sentence-transformers folder of an encoder's: modules, pooling, and a trained dense layer."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    for path in kinds:
        (folder / path).mkdir(exist_ok=True)
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    versions = {"sentence_transformers": "4.1.0", "transformers": "4.50.0", "pytorch": "2.6.0"}
    _write(
        folder / "config_sentence_transformers.json",
        {"__version__": versions, "prompts": {"query": "w1 "}, "similarity_fn_name": "cosine"},
    )
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True})
    activation = "torch.nn.modules.activation.Tanh"
    sizes = {"in_features": width, "out_features": dense, "bias": True, "activation_function": activation}
    _write(folder / "2_Dense/config.json", sizes)
    generator = torch.Generator().manual_seed(seed)
    layer = {
        "linear.weight": torch.randn(dense, width, generator=generator),
        "linear.bias": torch.randn(dense, generator=generator),
    }
    save_file(layer, folder / "2_Dense/model.safetensors", {"format": "pt"})
    return folder


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2))
