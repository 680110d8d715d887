"""Training: a tokenizer, masked-language-model pretraining of a small BERT, full fine-tuning on each task.

Everything is counted in steps and drawn from seeds, so the same software gives the same models. Sequences are
sorted into batches of similar length: most texts are far shorter than the longest, and padding costs time.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

from .muon import Muon
from .tasks import NUM_INTENSITIES, Task, pixel_token

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIXELS = [pixel_token(left, right) for left in range(NUM_INTENSITIES) for right in range(NUM_INTENSITIES)]
IGNORED = -100  # target of a position that was not masked


@dataclass(frozen=True)
class Sizes:
    """How large the model is and how long it trains."""

    hidden: int = 128
    num_layers: int = 4
    vocabulary: int = 2048
    max_length: int = 48
    pretrain_steps: int = 800
    pretrain_batch: int = 64
    finetune_steps: int = 300
    finetune_batch: int = 32
    finetune_rate: float = 5e-4


Batch = tuple[Tensor, Tensor, Tensor]  # token ids (batch, length), attention mask (batch, length), labels (batch,)
Report = Callable[[str], None]


def pretrain(texts: list[str], folder: Path, sizes: Sizes, report: Report) -> None:
    """Train tokenizer and encoder on `texts`; save both under `folder` as transformers does."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(texts, sizes)
    encoder = BertModel(_config(sizes), add_pooling_layer=False).eval()  # no dropout: most texts are seen once
    head = nn.Sequential(nn.Linear(sizes.hidden, sizes.hidden), nn.GELU(), nn.LayerNorm(sizes.hidden))
    bias = nn.Parameter(torch.zeros(sizes.vocabulary))

    def loss(batch: Batch) -> Tensor:
        ids, mask, _ = batch
        corrupted, targets = _mask_tokens(ids, sizes.vocabulary)
        hidden = encoder(corrupted, attention_mask=mask).last_hidden_state[targets != IGNORED]
        logits = head(hidden) @ encoder.embeddings.word_embeddings.weight.T + bias
        return nn.functional.cross_entropy(logits, targets[targets != IGNORED])

    batches = make_batches(tokenizer, [(text, 0) for text in texts], batch_size=sizes.pretrain_batch)
    matrices = [
        weight for name, weight in encoder.named_parameters() if name.startswith("encoder") and weight.ndim == 2
    ]
    others = [*encoder.embeddings.parameters(), *head.parameters(), bias]
    others += [weight for name, weight in encoder.named_parameters() if name.startswith("encoder") and weight.ndim == 1]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98))]
    _descend(optimizers, loss, batches, steps=sizes.pretrain_steps, report=report)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def finetune(base: Path, task: Task, folder: Path, sizes: Sizes, report: Report) -> None:
    """Fit a linear head to the base's features, freeze it, then train every weight of the encoder under it.

    A head that starts at random would first drag the encoder to wherever it happens to point. Under a fitted one the
    encoder learns more and moves less, and the base with all heads is a model that merges can be compared with.
    """
    torch.manual_seed(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    encoder = load_encoder(base)
    batches = make_batches(tokenizer, task.splits["train"], batch_size=sizes.finetune_batch)
    head = _fit_head(encoder, batches, len(task.labels))
    encoder.train()

    def loss(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(head(features(encoder, batch)), batch[2])

    optimizer = torch.optim.AdamW(encoder.parameters(), lr=sizes.finetune_rate)
    _descend([optimizer], loss, batches, steps=sizes.finetune_steps, report=report)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({name: value.detach() for name, value in head.named_parameters()}, folder / "head.safetensors")


def _fit_head(encoder: BertModel, batches: list[Batch], num_labels: int) -> nn.Linear:
    """Multinomial logistic regression on the encoder's features."""
    with torch.no_grad():
        inputs = torch.cat([features(encoder, batch) for batch in batches])
    labels = torch.cat([batch[2] for batch in batches])
    head = nn.Linear(inputs.shape[1], num_labels)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(inputs), labels) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def quiet(*, num_threads: int) -> None:
    """Use that many threads, and leave the terminal to our own progress lines."""
    torch.set_num_threads(num_threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_encoder(folder: Path) -> BertModel:
    """The encoder of a checkpoint folder, ready to predict."""
    return BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()


def features(encoder: BertModel, batch: Batch) -> Tensor:
    """Mean of the last layer over the tokens that are not padding: (batch, hidden)."""
    ids, mask, _ = batch
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


Folders = dict[str, dict[str, Path]]  # row of the table -> task -> folder of the encoder to score


@torch.inference_mode()
def evaluate(
    rows: Folders, heads: dict[str, Path], examples: dict[str, list[tuple[str, int]]]
) -> dict[str, dict[str, float]]:
    """Accuracy of every row's encoder on every task, with the task's own head."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(next(iter(heads.values())))
    batches = {task: make_batches(tokenizer, pairs, batch_size=64) for task, pairs in examples.items()}
    return {
        name: {task: accuracy(load_encoder(folder), heads[task], batches[task]) for task, folder in row.items()}
        for name, row in rows.items()
    }


@torch.inference_mode()
def accuracy(encoder: BertModel, head_folder: Path, batches: Iterable[Batch]) -> float:
    """Share of examples whose class the head in `head_folder` finds on top of `encoder`."""
    head = load_file(head_folder / "head.safetensors")
    right = total = 0
    for batch in batches:
        scores = nn.functional.linear(features(encoder, batch), head["weight"], head["bias"])
        right += int((scores.argmax(1) == batch[2]).sum())
        total += len(batch[2])
    return right / total


def make_tokenizer(texts: list[str], sizes: Sizes) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `texts`, with one token for every pair of pixels."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary,
        special_tokens=SPECIAL + PIXELS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text in texts if not text.startswith(PIXELS[0][:4])), trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=sizes.max_length, **names)


def make_batches(
    tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, int]], *, batch_size: int
) -> list[Batch]:
    """Padded batches of similar length that cover `examples` once, shortest first."""
    rows = tokenizer([text for text, _ in examples], truncation=True)["input_ids"]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = torch.zeros(len(chosen), len(rows[chosen[-1]]), dtype=torch.long)
        for line, index in zip(ids, chosen, strict=True):
            line[: len(rows[index])] = torch.tensor(rows[index])
        batches.append((ids, (ids != 0).long(), torch.tensor([examples[index][1] for index in chosen])))
    return batches


def _descend(
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[Batch], Tensor],
    batches: list[Batch],
    *,
    steps: int,
    report: Report,
) -> None:
    """A tenth of the steps to warm up, then a linear way down; batches in a new random order each epoch."""
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        )
        for optimizer in optimizers
    ]
    parameters = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    order: list[int] = []
    mean, started = 0.0, time.monotonic()
    for step in range(steps):
        order = order or torch.randperm(len(batches)).tolist()
        value = loss(batches[order.pop()])
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        mean += (value.item() - mean) / min(step + 1, 50)
        if (step + 1) % -(-steps // 4) == 0 or step + 1 == steps:
            report(f"step {step + 1}/{steps}, loss {mean:.2f}, {time.monotonic() - started:.0f} s")


def _mask_tokens(ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """BERT's corruption with 30 % of the tokens to be predicted: 80 % of those hidden, 10 % replaced by others."""
    chosen = (torch.rand(ids.shape) < 0.3) & (ids >= len(SPECIAL))
    kind = torch.rand(ids.shape)
    corrupted = ids.masked_fill(chosen & (kind < 0.8), SPECIAL.index("[MASK]"))
    corrupted = torch.where(chosen & (kind > 0.9), torch.randint_like(ids, len(SPECIAL), vocabulary), corrupted)
    return corrupted, ids.masked_fill(~chosen, IGNORED)


def _config(sizes: Sizes) -> BertConfig:
    return BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.hidden // 32,
        intermediate_size=2 * sizes.hidden,
        max_position_embeddings=sizes.max_length,
        pad_token_id=0,
    )
