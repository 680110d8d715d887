"""Which scale for which method by singular values: real fine-tunes, merged without data, each asked its own task.

    python -m scripts.studies.spectral FOLDER [--tasks NAME ...] [--steps 300] [--samples 300] [--only GLOB ...]

Base, tasks and experts are those of the study of mass, made in FOLDER unless they are there; so are merges, and
results.json with results.md made of it.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mergetool
from scripts.demo.tasks import Task
from scripts.studies.mass.__main__ import Study, encoder, with_known_task
from scripts.studies.mass.experts import Training
from scripts.studies.mass.tasks import SETS, prepare

RECOVER, BY_TENSOR = "recover", {"recover": "tensor", "cap": 3.0}
SCALES: dict[str, Any] = {"1": 1.0, "recover": RECOVER, "recover by tensor": BY_TENSOR}
RECOVERING = ("tsv-merge", "iso-c", "iso-cts", "dc-merge")
OTHERS: dict[str, dict[str, Any]] = {
    "linear": {"merge": {"method": "linear"}},
    "task-arithmetic, 0.4": {"merge": {"method": "task-arithmetic", "scale": 0.4}},
    "ties": {"merge": {"method": "ties"}},
    "wudi": {"merge": {"method": "wudi"}},
    "swudi": {"merge": {"method": "swudi"}},
    "star": {"merge": {"method": "star"}},
    "task-arithmetic, 1, then svc": {
        "merge": {"method": "task-arithmetic", "scale": 1.0},
        "then": [{"step": "svc"}],
    },
    "iso-cts, 1, then svc": {"merge": {"method": "iso-cts", "scale": 1.0}, "then": [{"step": "svc"}]},
}
ALL = {"filter": "fusionbench"}
"""Embeddings are matrices, too."""


def merges() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is compared: sections of recipes."""
    yield from OTHERS.items()
    for method in RECOVERING:
        for told, scale in SCALES.items():
            yield f"{method}, {told}", {"merge": {"method": method, "scale": scale}}
    for method, told in (("tsv-merge", "1"), ("tsv-merge", "recover"), ("iso-c", "recover"), ("iso-cts", "recover")):
        yield f"{method}, {told}, with embeddings", {"merge": {"method": method, "scale": SCALES[told], **ALL}}


def accuracy(study: Study, name: str, sections: dict[str, Any]) -> dict[str, float]:
    """Accuracy by task, and the seconds that the merge took."""
    output, started = study.folder / "made" / name.replace(" ", "-").replace(",", ""), time.monotonic()
    recipe = {**study.recipe(sections["merge"]), **sections}
    result = mergetool.run(recipe, output=output, overwrite=True)
    seconds = time.monotonic() - started
    told = [note for note in result.notes if "counted over" in note]
    print(f"{name}: {seconds:.1f} s {' '.join(told)}", file=sys.stderr)
    return {**with_known_task(study, lambda _: encoder(output)), "seconds": seconds}


def table(known: Mapping[str, Mapping[str, float]], tasks: list[str]) -> str:
    """Accuracy relative to the experts': of every task, the mean and the worst; the best method first."""
    shares = {name: [each[task] / known["experts"][task] for task in tasks] for name, each in known.items()}
    head = ["", *tasks, "mean", "worst", "seconds"]
    lines = [head, ["---"] * len(head)]
    for name in sorted(shares, key=lambda name: -sum(shares[name])):
        each, seconds = shares[name], known[name].get("seconds", 0.0)
        numbers = [*each, sum(each) / len(each), min(each)]
        lines.append([name, *(f"{number:.3f}" for number in numbers), f"{seconds:.0f}" if seconds else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def chosen(folder: Path, names: list[str]) -> list[Task]:
    """Tasks by name, of whichever set."""
    every = [
        task
        for one in SETS
        if set(names) & set(SETS[one])
        for task in prepare(one, folder / "wheels", folder / "tasks")
    ]
    return [task for task in every if task.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[*SETS["first"], "script"], help="names of tasks of both sets")
    parser.add_argument("--steps", type=int, default=Training.steps, help="length of every fine-tune")
    parser.add_argument("--samples", type=int, default=300, help="test samples of every task")
    parser.add_argument("--only", nargs="+", default=["*"], help="globs on what is compared, the first ones first")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(folder, chosen(folder, given.tasks), Training(given.steps), given.samples)
    group, names = f"{', '.join(sorted(given.tasks))}", [task.name for task in study.tasks]
    own = study.folder / "experts"
    study.part(group, "experts", lambda: with_known_task(study, lambda task: encoder(own / task.name)))
    every = dict(merges())
    wanted = dict.fromkeys(name for glob in given.only for name in every if fnmatch(name, glob))
    for name, sections in ((name, every[name]) for name in wanted):
        study.part(group, name, lambda name=name, sections=sections: accuracy(study, name, sections))
        (folder / "results.md").write_text(table(study.results[group], names))
    print(table(study.results[group], names))


if __name__ == "__main__":
    main()
