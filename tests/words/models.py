"""Small real models whose tokenizers were trained on different texts: other tokens, other numbers, other sizes."""

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = {
    "stories": ["the old sailor told a story about the sea and the stars", "she walked home through the quiet town"]
    * 9,
    "code": ["def merge(models): return sum(models) / len(models)", "for name in names: print(name, names[name])"] * 9,
    "letters": ["dear friend the sea is calm and the stars are out", "write to me about the quiet town and its people"]
    * 9,
}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
PROMPT = "the quiet sea and the name"


def train(kind, text, size, special=SPECIAL):
    """A tokenizer of a kind, trained on one of the texts."""
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    made.train_from_iterator(TEXTS[text], trainer)
    return made


def save_tokenizer(folder, made, **settings):
    known = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {key: token for key, token in known.items() if made.token_to_id(token) is not None} | settings
    hf.PreTrainedTokenizerFast(tokenizer_object=made, **settings).save_pretrained(folder)


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**_DECODER, "tie_word_embeddings": False}, "bpe"),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**_DECODER, "tie_word_embeddings": True}, "bpe"),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2}, "bpe"),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _DECODER, "unigram"),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {**_SIZES, "intermediate_size": 24}, "wordpiece"),
}


def build(folder, family, text, seed, *, size=300, rows=None, special=SPECIAL, **changes):
    """A model folder: weights of its own, and a tokenizer trained on `text`. Gives the folder."""
    kind, config, sizes, words = FAMILIES[family]
    made = train(words, text, size, special)
    rows = rows or made.get_vocab_size()
    ends = {"bos_token_id": made.token_to_id("<s>"), "eos_token_id": made.token_to_id("</s>"), "pad_token_id": None}
    torch.manual_seed(seed)
    model = kind(config(vocab_size=rows, **{**sizes, **ends, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder, made)
    return Path(folder)


def vocabulary(folder):
    return hf.AutoTokenizer.from_pretrained(folder).get_vocab()


def opened(folder):
    """The network, and what it was told when it was opened: nothing may be missing."""
    kind = getattr(hf, json.loads((Path(folder) / "config.json").read_text())["architectures"][0])
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits
