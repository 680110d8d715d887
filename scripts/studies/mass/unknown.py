"""Does a bundle know when it does not know? Known inputs of the study's tasks, and strange ones of many kinds.

    python -m scripts.studies.mass.unknown FOLDER [--tasks NAME ...] [--samples 200] [--rows 50]

Experts of these tasks are trained in FOLDER unless they are there; all other tasks of both sets are text from unrelated
sources. Measured as the bundle is made, without any data, and after `calibrate` with some rows of each task. Test rows
are counted one by one beside the experts themselves, and a mixed batch of 64 is timed. Writes `unknown.json`.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import mergetool
from mergetool.bundle.calibrate import calibrate
from mergetool.bundle.mass_model import MassModel
from scripts.demo.tasks import Task

from .experts import MAX_LENGTH, Training, encode, features
from .experts import prepare as experts
from .study import encoder
from .tasks import SETS, chosen

SIX = ("category", "digits", "keyword", "language", "measurement", "script")
BATCH = 32
GLUED_TOKENS = 15
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789!?.,-"


def strange(tokenizer: Any, known: Mapping[str, Sequence[str]], count: int) -> dict[str, list[str]]:
    """Texts that belong to no task, or to two."""
    draw = random.Random(0)
    words = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.all_special_ids]

    def beginning(task: str, length: int = 0) -> str:
        ids = tokenizer(draw.choice(known[task]), add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[: length or draw.randint(4, GLUED_TOKENS)])

    return {
        "random tokens": [tokenizer.decode(draw.choices(words, k=draw.randint(4, 28))) for _ in range(count)],
        "repeated characters": [
            draw.choice(("", " ")).join([draw.choice(CHARACTERS)] * draw.randint(2, 40)) for _ in range(count)
        ],
        "two tasks glued": [
            " ".join(beginning(task, GLUED_TOKENS) for task in draw.sample(sorted(known), 2)) for _ in range(count)
        ],
        "glued anywhere": [" ".join(map(beginning, draw.sample(sorted(known), 2))) for _ in range(count)],
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
        "strict and known": {
            name: sum(row["strict"] and row["known"] for row in each) / len(each) for name, each in answers.items()
        },
        "strict where known": {
            name: sum(row["strict"] for row in each if row["known"]) / len(each) for name, each in answers.items()
        },
        "nearest right": sum(row["task"] for row in rows) / len(rows),
        "probability": figures(rows, "sure"),
        "coefficient": figures(rows, "claim"),
        "strange refused": {name: measured.refused(texts) for name, texts in others.items()},
    }


@torch.inference_mode()
def alone(folder: Path, tokenizer: Any, task: Task, count: int) -> float:
    """Accuracy of the expert itself."""
    head = load_file(folder / "head.safetensors")
    own, rows, right = encoder(folder), task.splits["test"][:count], 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        scores = features(own, encode(tokenizer, [text for text, _ in part])) @ head["weight"].mT + head["bias"]
        right += sum(int(a) == b for a, (_, b) in zip(scores.argmax(1), part, strict=True))
    return right / len(rows)


@torch.inference_mode()
def speed(models: Mapping[str, Any], tokenizer: Any, tasks: Sequence[Task], turns: int = 7) -> dict[str, float]:
    """Least process time of a mixed batch of 64, in turns, in seconds; of one thread."""
    texts = [task.splits["test"][row][0] for row in range(64) for task in tasks][:64]
    inputs, least = encode(tokenizer, texts), dict.fromkeys(models, float("inf"))
    torch.set_num_threads(1)
    for _ in range(turns):
        for name, model in models.items():
            started = time.process_time()
            model(**inputs)
            least[name] = min(least[name], time.process_time() - started)
    return least


def made(folder: Path, tasks: Sequence[Task]) -> Path:
    """A bundle that tells unknown inputs, and answers them all the same."""
    bundle = folder / "made" / "mass-unknown"
    if not bundle.exists():
        models = {
            task.name: {"source": str(source), "head": {"weights": str(source / "head.safetensors")}}
            for task in tasks
            for source in [folder / "experts" / task.name]
        }
        merge = {"method": "mass", "router": {"unknown": "nearest"}}
        recipe = {"base": str(folder / "base"), "models": models, "merge": merge, "check": {"missing": "base"}}
        mergetool.run(recipe, output=bundle, cache=folder / "factors")
    return bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=SIX, help="tasks of either set that the bundle knows")
    parser.add_argument("--steps", type=int, default=60, help="length of every fine-tune")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--samples", type=int, default=200, help="test samples of every task and of strange texts")
    parser.add_argument("--rows", type=int, default=50, help="rows of each task to calibrate with")
    given = parser.parse_args()
    folder, every = given.folder.absolute(), [name for kind in SETS for name in SETS[kind]]
    tasks = chosen(folder, given.tasks)
    experts(folder, tasks, Training(given.steps, given.batch))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.model_max_length = MAX_LENGTH
    others = strange(tokenizer, {task.name: [text for text, _ in task.splits["test"]] for task in tasks}, given.samples)
    for task in chosen(folder, [name for name in every if name not in given.tasks]):
        others[f"text: {task.name}"] = [text for text, _ in task.splits["test"]][: given.samples]
    bundle = made(folder, tasks)
    fitted = shutil.copytree(bundle, folder / "made" / "mass-unknown-calibrated", dirs_exist_ok=True)
    (fitted / "calibration.json").unlink(missing_ok=True)
    own = {task.name: alone(folder / "experts" / task.name, tokenizer, task, given.samples) for task in tasks}
    plain, model = mergetool.load_bundle(bundle), mergetool.load_bundle(fitted)
    results: dict[str, Any] = {"experts": own}
    results["without data"] = measure(plain, tokenizer, tasks, given.samples, others)
    model.tokenizer().model_max_length = MAX_LENGTH
    rows = [{"text": text, "task": task.name} for task in tasks for text, _ in task.splits["train"][: given.rows]]
    calibrate(model, rows)
    results["calibrated"] = measure(model, tokenizer, tasks, given.samples, others)
    for found in (results["without data"], results["calibrated"]):
        found["strict, refused as wrong, of the experts"] = sum(
            found["strict and known"][name] / own[name] for name in own
        ) / len(own)
        found["strict of the experts"] = sum(found["strict"][name] / own[name] for name in own) / len(own)
    timed = {"base": plain.base, "bundle": plain, "calibrated": model}
    results["seconds"] = speed(timed, tokenizer, tasks)
    (folder / "unknown.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
