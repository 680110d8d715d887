"""What studies on fine-tunes of the encoder share: tasks, base and experts in a folder, recipes, accuracy, results."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import mergetool
from scripts.demo.tasks import Task

from . import experts
from .experts import Training, encode, features
from .tasks import SETS, prepare

BATCH = 64


class Study:
    """What all parts of the study need, and the results so far."""

    def __init__(self, folder: Path, tasks: list[Task], training: Training, num_samples: int) -> None:
        self.folder = folder
        self.tasks = tasks
        experts.prepare(folder, tasks, training)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self.num_samples = num_samples
        self.results: dict[str, dict] = {}
        if (folder / "results.json").exists():
            self.results = json.loads((folder / "results.json").read_text())

    def rows(self, task: Task) -> list[tuple[str, int]]:
        return task.splits["test"][: self.num_samples]

    def batches(self, task: Task) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows = self.rows(task)
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            yield encode(self.tokenizer, [text for text, _ in part]), torch.tensor([label for _, label in part])

    def head(self, task: Task) -> dict[str, Tensor]:
        return load_file(self.folder / "experts" / task.name / "head.safetensors")

    def recipe(self, merge: dict[str, object], *, heads: bool = False) -> dict[str, object]:
        models = {}
        for task in self.tasks:
            source = self.folder / "experts" / task.name
            models[task.name] = {"source": str(source)}
            if heads:
                models[task.name]["head"] = {"weights": str(source / "head.safetensors"), "labels": list(task.labels)}
        if merge["method"] == "linear":
            return {"models": models, "merge": merge}
        # transformers no longer saves the buffer of positions that the published encoder still holds
        return {"base": str(self.folder / "base"), "models": models, "merge": merge, "check": {"missing": "base"}}

    def make(self, name: str, merge: dict[str, object], *, heads: bool = False) -> Path:
        output = self.folder / "made" / name.replace(" ", "-").replace(",", "")
        if not output.exists():
            shared = {"cache": self.folder / "factors"} if merge["method"] in ("mass", "tsv-merge") else {}
            mergetool.run(self.recipe(merge, heads=heads), output=output, **shared)
        return output

    def part(self, group: str, name: str, measure: Callable[[], object]) -> None:
        """One number or mapping of the results, measured unless it is there."""
        known = self.results.setdefault(group, {})
        if name not in known:
            started = time.monotonic()
            known[name] = measure()
            (self.folder / "results.json").write_text(json.dumps(self.results, indent=1))
            print(f"{group}: {name} ({time.monotonic() - started:.0f} s)", file=sys.stderr)


def arguments(told: str | None, **defaults: int) -> argparse.ArgumentParser:
    """What every such study is told; `defaults` are its own numbers."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    steps, samples = defaults.get("steps", Training.steps), defaults.get("samples", 300)
    parser.add_argument("--steps", type=int, default=steps, help="length of every fine-tune")
    parser.add_argument("--samples", type=int, default=samples, help="test samples of every task")
    return parser


def begun(told: str | None, **defaults: int) -> Study:
    """The study of one set of tasks that the command line asks for, with its experts' accuracy."""
    parser = arguments(told, **defaults)
    parser.add_argument("--set", choices=SETS, default="first", help="which five tasks")
    given = parser.parse_args()
    folder = made(given.folder)
    tasks = prepare(given.set, folder / "wheels", folder / "tasks")
    study = Study(folder, tasks, Training(given.steps), given.samples)
    own = study.folder / "experts"
    study.part("known task", "experts", lambda: with_known_task(study, lambda task: encoder(own / task.name)))
    return study


def made(folder: Path) -> Path:
    """The folder's full path, once it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


@torch.inference_mode()
def right(study: Study, task: Task, encoder: nn.Module) -> Tensor:
    """Whether each test input's class is found when the task's own head reads the encoder."""
    head, found = study.head(task), []
    for inputs, labels in study.batches(task):
        scores = nn.functional.linear(features(encoder, inputs), head["weight"], head["bias"])
        found.append(scores.argmax(1) == labels)
    return torch.cat(found)


def with_known_task(study: Study, encoder_of: Callable[[Task], nn.Module]) -> dict[str, float]:
    """Accuracy by task."""
    return {task.name: float(right(study, task, encoder_of(task)).double().mean()) for task in study.tasks}


def encoder(folder: Path) -> nn.Module:
    return BertModel.from_pretrained(folder, dtype=torch.float32).eval()
