"""Small networks as transformers saves them, with a tokenizer of words w0, w1 ..., and rows for them."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.dense import write_dense
from tests.zoo.text import save_tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
LABELS = ("bad", "fair", "good")
TEXTS = ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10", "w11 w12", "w13", "w2 w4 w6", "w20 w21 w22 w23")


def write_classifier(folder, seed=0, kind="BertForSequenceClassification", **more):
    """A BERT with a head of three classes, in which everything was drawn."""
    names = dict(enumerate(LABELS))
    config = transformers.BertConfig(
        **{**SIZES, "id2label": names, "label2id": {v: k for k, v in names.items()}, **more}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return save_tokenizer(folder)


def write_near(folder):
    """Models a and b near one base, as fine-tunes are, of two kinds, and a file of rows for each."""
    for kind, write in (("bert", write_classifier), ("llama", write_dense)):
        write(folder / f"{kind}-base", seed=9)
        base = load_file(folder / f"{kind}-base" / "model.safetensors")
        for seed, name in enumerate("ab"):
            write(folder / f"{kind}-{name}", seed=seed)
            path = folder / f"{kind}-{name}" / "model.safetensors"
            near = {key: base[key] + 0.4 * (value - base[key]) for key, value in load_file(path).items()}
            save_file(near, path, {"format": "pt"})
    write_rows(folder / "a.jsonl", TEXTS[:4])
    write_rows(folder / "b.jsonl", TEXTS[4:])
    return folder


def write_rows(path, texts=TEXTS, labels=True, **more):
    """A file of rows, their classes in turn."""
    rows = ({"text": text, **({"label": i % len(LABELS)} if labels else {}), **more} for i, text in enumerate(texts))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def opened(folder, kind="AutoModelForSequenceClassification"):
    return getattr(transformers, kind).from_pretrained(folder).eval()


def inputs_of(folder, texts=TEXTS):
    """Each text by itself, as the network takes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [dict(tokenizer(text, return_tensors="pt")) for text in texts]


__all__ = ["LABELS", "TEXTS", "inputs_of", "opened", "write_classifier", "write_dense", "write_near", "write_rows"]
