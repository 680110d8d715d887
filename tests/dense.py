"""Dense language models of a few thousand parameters, whole, with a tokenizer of words w0, w1 ..."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.zoo.text import save_tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
MORE = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def write_dense(folder: Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **more) -> Path:
    """Save a model of this kind, with weights of its own and norms that are not 1."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**{**SIZES, **MORE[kind], **more})
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    model.to(dtype).save_pretrained(folder)
    return save_bytes(folder) if kind.startswith("qwen") else save_tokenizer(folder)


def save_bytes(folder: Path) -> Path:
    """A tokenizer of single characters without a first token, of the kind that transformers opens for a Qwen."""
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *"w0123456789\u0120"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


def set_config(folder: Path, **changes) -> Path:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config))
    return folder


def logits(folder: Path, length: int = 20, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a model says to some tokens; it must open without anything missing or left over."""
    kind = transformers.AutoModelForCausalLM
    model, told = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(told[words] for words in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    tokens = torch.arange(4, 4 + length).repeat(2, 1)
    tokens[1] = tokens[1].flip(0)
    with torch.no_grad():
        return model.eval()(tokens).logits
