"""A small Llama, its tokenizer, and a fine-tune for each skill, trained here in minutes on a CPU."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from .skills import LARGEST, LETTERS, SKILLS, WORDS, lines, mixed_lines


@dataclass(frozen=True)
class Training:
    """How large the model is and how long it trains."""

    hidden: int = 160
    num_layers: int = 3
    pretrain_steps: int = 2000
    finetune_steps: int = 80
    batch: int = 64
    pretrain_rate: float = 1.5e-3
    finetune_rate: float = 2e-4


def prepare(folder: Path, training: Training, say: Callable[[str], None]) -> None:
    """`folder/base` and a folder for every skill. What is there already is not made again."""
    logging.disable_progress_bar()
    if not (folder / "base" / "config.json").exists():
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        model = LlamaForCausalLM(_config(training, len(tokenizer)))
        say(f"base: {sum(p.numel() for p in model.parameters()):,} parameters")
        run = Run(training.pretrain_steps, training.pretrain_rate, training.batch)
        _train(model, tokenizer, mixed_lines(0), run, say)
        _save(model, tokenizer, folder / "base")
    for skill in SKILLS:
        if not (folder / skill / "config.json").exists():
            torch.manual_seed(1)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
            model = LlamaForCausalLM.from_pretrained(folder / "base")
            run = Run(training.finetune_steps, training.finetune_rate, training.batch)
            _train(model, tokenizer, lines(skill, 1), run, say)
            _save(model, tokenizer, folder / skill)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *WORDS, *LETTERS, *map(str, range(LARGEST))]
    plain = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def _config(training: Training, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=training.hidden,
        intermediate_size=2 * training.hidden,
        num_hidden_layers=training.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Run:
    """One training run."""

    steps: int
    rate: float
    batch: int


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterator[str],
    run: Run,
    say: Callable[[str], None],
) -> None:
    """Learn to say the last word of every line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, total_steps=run.steps, pct_start=0.1)
    model.train()
    started = time.monotonic()
    for step in range(run.steps):
        batch = tokenizer(list(islice(texts, run.batch)), padding=True, return_tensors="pt", padding_side="left")
        ids, given = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids[:, :-1], attention_mask=given[:, :-1], logits_to_keep=1).logits[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, ids[:, -1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            say(f"step {step + 1} of {run.steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s")


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
