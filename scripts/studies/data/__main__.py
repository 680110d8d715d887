"""What some rows of data are worth: merges with them beside merges without, each asked its own tasks.

    python -m scripts.studies.data FOLDER [--tasks NAME ...] [--steps 300] [--samples 300] [--rows 16 64 256]

Base, tasks and fine-tunes are those of the study of mass, made in FOLDER unless they are there; so are merges, and
results.json with results.md made of it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mergetool
from mergetool.search.interval import of_difference
from scripts.demo.tasks import Task
from scripts.studies.data.classifiers import prepare, right
from scripts.studies.mass import experts
from scripts.studies.mass.experts import MAX_LENGTH, Training
from scripts.studies.mass.tasks import SETS, chosen

WITHOUT: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "tsv-merge": {"method": "tsv-merge"},
    "iso-c": {"method": "iso-c"},
    "wudi": {"method": "wudi"},
}
WITH: dict[str, dict[str, Any]] = {
    "regmean": {"method": "regmean"},
    "regmean-plus": {"method": "regmean-plus"},
    "esm": {"method": "esm"},
    "fisher": {"method": "fisher"},
    "ada-merging": {"method": "ada-merging", "steps": 40, "rate": 0.02, "batch": 8},
}


def cases(rows: list[int]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """What is compared: name, section, rows of each task (0 without data)."""
    for name, merge in WITHOUT.items():
        yield name, merge, 0
    for count in rows:
        for name, merge in WITH.items():
            yield f"{name}, {count} rows", merge, count


def recipe(folder: Path, tasks: list[Task], merge: dict[str, Any], rows: int) -> dict[str, Any]:
    """Encoders are merged; the head of the result is the first model's, and nobody asks it."""
    models = {task.name: str(folder / "models" / task.name) for task in tasks}
    made = {
        "models": models,
        "merge": {**merge, "overrides": [{"match": "classifier.*", "use": tasks[0].name}]},
    }
    if merge["method"] in ("tsv-merge", "iso-c", "wudi", "ada-merging", "esm"):
        made["base"] = str(folder / "models" / "base")
    if rows:
        each = {"samples": rows, "length": MAX_LENGTH}
        made["calibration"] = {name: {"data": str(folder / f"{name}.jsonl"), **each} for name in models}
    return made


def scores(folder: Path, tasks: list[Task], name: str, merge: dict[str, Any], rows: int, samples: int) -> dict:
    """Which test rows of each task are answered, and the seconds that merging took."""
    output, started = folder / "made" / name.replace(", ", "-").replace(" ", "-"), time.monotonic()
    mergetool.run(recipe(folder, tasks, merge, rows), output=output, overwrite=True, cache=_cache(folder, rows))
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.0f} s", file=sys.stderr)
    return {"seconds": seconds, "right": {task.name: right(folder, output, task, samples) for task in tasks}}


def _cache(folder: Path, rows: int) -> Path | None:
    return folder / "kept" if rows else None


def table(known: dict[str, Any], tasks: list[str]) -> str:
    """Accuracy of every task and their mean, and the difference of means to the best merge without data."""
    means = {name: np.mean([np.mean(each["right"][task]) for task in tasks]) for name, each in known.items()}
    best = max((name for name in means if name in WITHOUT), key=means.__getitem__)
    lines = [["", *tasks, "mean", f"minus {best}", "seconds"]]
    lines.append(["---"] * len(lines[0]))
    for name in sorted(means, key=lambda name: -means[name]):
        each = [np.array(known[name]["right"][task], float) for task in tasks]
        other = [np.array(known[best]["right"][task], float) for task in tasks]
        low, high = of_difference(np.concatenate(each), np.concatenate(other))
        apart = "" if name in (best, "experts") else f"{low:+.3f} to {high:+.3f}"
        seconds = f"{known[name]['seconds']:.0f}" if known[name]["seconds"] else ""
        lines.append([name, *(f"{part.mean():.3f}" for part in each), f"{means[name]:.3f}", apart, seconds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[*SETS["first"], "script"], help="names of tasks of both sets")
    parser.add_argument("--steps", type=int, default=Training.steps, help="length of every fine-tune")
    parser.add_argument("--samples", type=int, default=300, help="test samples of every task")
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 256], help="rows of each task to merge with")
    given = parser.parse_args()
    folder = given.folder.absolute()
    tasks, names, path = chosen(folder, given.tasks), given.tasks, folder / "results.json"
    experts.prepare(folder, tasks, Training(given.steps))
    prepare(folder, tasks, max(given.rows))
    known = json.loads(path.read_text()) if path.exists() else {}
    if "experts" not in known:
        own = {task.name: right(folder, folder / "models" / task.name, task, given.samples) for task in tasks}
        known["experts"] = {"seconds": 0, "right": own}
    for name, merge, rows in cases(given.rows):
        if name not in known:
            known[name] = scores(folder, tasks, name, merge, rows, given.samples)
            path.write_text(json.dumps(known))
            (folder / "results.md").write_text(table(known, names))
    print(table(known, names))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
