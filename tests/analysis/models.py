"""Small real models: one ancestor, fine-tunes of it that were trained for a few steps, and what may go wrong."""

import shutil
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.words.models import TEXTS, build

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def ancestor(folder, seed=0):
    """A tiny Llama with a tokenizer."""
    return build(folder, "llama", "stories", seed, **SIZES)


def fine_tuned(base, folder, text, *, steps=12, rate=2e-3):
    """The base after a few steps of training on a text, saved with its tokenizer."""
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(base), hf.AutoTokenizer.from_pretrained(base)
    ids = tokenizer("\n".join(TEXTS[text]), return_tensors="pt").input_ids[:, :256]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(base, folder, model)


def saved(base, folder, model):
    """A network in a folder, beside the tokenizer of the base."""
    model.save_pretrained(folder)
    for file in Path(base).glob("*token*"):
        shutil.copy(file, folder)
    return Path(folder)


def changed(base, folder, change):
    """The base with `change(name, value)` in the place of every tensor."""
    shutil.copytree(base, folder)
    weights = load_file(Path(base) / "model.safetensors")
    made = {name: change(name, value).contiguous() for name, value in weights.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return Path(folder)


def state(folder):
    """A model's tensors in float64."""
    return {name: value.double() for name, value in load_file(Path(folder) / "model.safetensors").items()}
