"""The fine-tunes of the study of mass with their heads inside, so that a loss can be taken of what they say.

Their heads read the mean of the last layer. A head that is linear says of the mean what it says of every token on
average; so they are saved as a class of transformers that classifies tokens.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForTokenClassification, BertModel

from scripts.demo.tasks import Task
from scripts.studies.mass.experts import encode, features


def prepare(folder: Path, tasks: list[Task], rows: int) -> None:
    """Base, classifiers, and for each task a file of unlabelled rows that were not trained on."""
    if not (folder / "models" / "base").exists():
        _save(folder, "base", BertModel.from_pretrained(folder / "base", add_pooling_layer=False))
    for task in tasks:
        texts = [text for text, _ in task.splits["validation"][:rows]]
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (folder / f"{task.name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        if not (folder / "models" / task.name).exists():
            own = folder / "experts" / task.name
            model = BertForTokenClassification.from_pretrained(own, num_labels=len(task.labels))
            model.classifier.load_state_dict(load_file(own / "head.safetensors"))
            _save(folder, task.name, model)


def _save(folder: Path, name: str, model) -> None:
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "models" / name)
    model.save_pretrained(folder / "models" / name)


@torch.inference_mode()
def right(folder: Path, merged: Path, task: Task, samples: int) -> list[bool]:
    """For each test row, whether a merged encoder answers it under the head of the task's model."""
    own = BertForTokenClassification.from_pretrained(folder / "models" / task.name).eval()
    encoder = BertForTokenClassification.from_pretrained(merged).bert.eval()
    tokenizer, rows, found = AutoTokenizer.from_pretrained(folder / "base"), task.splits["test"][:samples], []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        answers = own.classifier(features(encoder, encode(tokenizer, [text for text, _ in part]))).argmax(1)
        found += [answer == label for answer, (_, label) in zip(answers.tolist(), part, strict=True)]
    return found
