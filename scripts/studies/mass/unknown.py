"""Does a bundle know when it does not know? Known inputs of the study's tasks, and strange ones of ten kinds.

    python -m scripts.studies.mass.unknown FOLDER [--set first|second] [--samples 200] [--rows 50]

FOLDER is that of the study (`python -m scripts.studies.mass`), with the experts of one set; the tasks of the other set
are text from unrelated sources. Measured as the bundle is made, without any data, and after `calibrate` with some rows
of each task. Writes `unknown.json`.
"""

import argparse
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import mergetool
from mergetool.bundle.calibrate import calibrate
from mergetool.bundle.mass_model import MassModel
from scripts.demo.tasks import Task, load

from .experts import MAX_LENGTH, encode
from .tasks import SETS, prepare

BATCH = 32
GLUED_TOKENS = 15
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789!?.,-"


def strange(tokenizer: Any, known: Mapping[str, Sequence[str]], count: int) -> dict[str, list[str]]:
    """Texts that belong to no task, or to two."""
    draw = random.Random(0)
    words = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.all_special_ids]

    def beginning(task: str) -> str:
        ids = tokenizer(draw.choice(known[task]), add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[:GLUED_TOKENS])

    return {
        "random tokens": [tokenizer.decode(draw.choices(words, k=draw.randint(4, 28))) for _ in range(count)],
        "repeated characters": [
            draw.choice(("", " ")).join([draw.choice(CHARACTERS)] * draw.randint(2, 40)) for _ in range(count)
        ],
        "two tasks glued": [" ".join(map(beginning, draw.sample(sorted(known), 2))) for _ in range(count)],
        "nothing": [""],
    }


class Measured:
    """What a bundle says of texts."""

    def __init__(self, model: MassModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def refused(self, texts: Sequence[str]) -> float:
        """Share of texts that are unknown."""
        parts = [encode(self._tokenizer, list(texts[start : start + BATCH])) for start in range(0, len(texts), BATCH)]
        known = torch.cat([self._model.route(**inputs).known for inputs in parts])
        return 1 - float(known.float().mean())

    def answers(self, rows: Sequence[tuple[str, int]], task: str) -> list[dict[str, Any]]:
        """For each row: whether it was known, whether the task was right, whether the class was, too, and how sure."""
        found = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            answer = self._model(**encode(self._tokenizer, [text for text, _ in part]))
            classes = answer.logits.argmax(1).tolist()
            for place, (_, label) in enumerate(part):
                right = answer.task[place] == task
                found.append(
                    {
                        "known": answer.known[place],
                        "task": right,
                        "strict": right and classes[place] == label,
                        "sure": answer.probability[place],
                        "claim": float(answer.coefficients[place].max()),
                    }
                )
        return found


def calibration_error(sure: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: how far confidence is from the share that is right, over bins of confidence."""
    error = 0.0
    for place in range(bins):
        inside = [i for i, value in enumerate(sure) if min(int(value * bins), bins - 1) == place]
        if inside:
            mean = sum(sure[i] for i in inside) / len(inside)
            error += len(inside) / len(sure) * abs(mean - sum(right[i] for i in inside) / len(inside))
    return error


def figures(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """How well a confidence fits."""
    wrong = [row[key] for row in rows if not row["task"]]
    return {
        "calibration error": calibration_error([row[key] for row in rows], [row["task"] for row in rows]),
        "confidence where wrong": sum(wrong) / len(wrong) if wrong else float("nan"),
    }


def measure(
    model: MassModel, tokenizer: Any, tasks: Sequence[Task], count: int, others: Mapping[str, list[str]]
) -> dict:
    """All figures of a bundle that refuses (or tells of) unknown inputs."""
    measured = Measured(model, tokenizer)
    answers = {task.name: measured.answers(task.splits["test"][:count], task.name) for task in tasks}
    rows = [row for each in answers.values() for row in each]
    return {
        "known refused": {name: 1 - sum(row["known"] for row in each) / len(each) for name, each in answers.items()},
        "known refused, all": 1 - sum(row["known"] for row in rows) / len(rows),
        "strict": {name: sum(row["strict"] for row in each) / len(each) for name, each in answers.items()},
        "strict where known": {
            name: sum(row["strict"] for row in each if row["known"]) / len(each) for name, each in answers.items()
        },
        "nearest right": sum(row["task"] for row in rows) / len(rows),
        "probability": figures(rows, "sure"),
        "coefficient": figures(rows, "claim"),
        "strange refused": {name: measured.refused(texts) for name, texts in others.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", choices=SETS, default="first", help="which five tasks")
    parser.add_argument("--samples", type=int, default=200, help="test samples of every task and of strange texts")
    parser.add_argument("--rows", type=int, default=50, help="rows of each task to calibrate with")
    given = parser.parse_args()
    folder = given.folder.absolute()
    names = [name for name in SETS[given.set] if (folder / "experts" / name / "head.safetensors").exists()]
    tasks = [load(folder / "tasks" / f"{name}.json") for name in names]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.model_max_length = MAX_LENGTH
    texts = {task.name: [text for text, _ in task.splits["test"]] for task in tasks}
    others = strange(tokenizer, texts, given.samples)
    for kind in [kind for kind in SETS if kind != given.set]:
        for task in prepare(kind, folder / "wheels", folder / f"tasks-{kind}"):
            others[f"text: {task.name}"] = [text for text, _ in task.splits["test"]][: given.samples]
    bundle = folder / "made" / "mass-unknown"
    if not bundle.exists():
        models = {
            name: {"source": str(source), "head": {"weights": str(source / "head.safetensors")}}
            for name in names
            for source in [folder / "experts" / name]
        }
        merge = {"method": "mass", "router": {"unknown": "nearest"}}
        recipe = {"base": str(folder / "base"), "models": models, "merge": merge, "check": {"missing": "base"}}
        mergetool.run(recipe, output=bundle, cache=folder / "factors")
    fitted = shutil.copytree(bundle, folder / "made" / "mass-unknown-calibrated", dirs_exist_ok=True)
    (fitted / "calibration.json").unlink(missing_ok=True)
    results = {"without data": measure(mergetool.load_bundle(bundle), tokenizer, tasks, given.samples, others)}
    model = mergetool.load_bundle(fitted)
    rows = [{"text": text, "task": task.name} for task in tasks for text, _ in task.splits["train"][: given.rows]]
    calibrate(model, rows)
    results["calibrated"] = measure(model, tokenizer, tasks, given.samples, others)
    (folder / "unknown.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
