"""Evolving merges of a small language model's fine-tunes: what few items cost, and what they save.

    python -m scripts.studies.merge3 FOLDER [--items 2000] [--seeds 3] [--trial]

Everything goes to FOLDER: models, tasks, one folder per search, results.json, results.md and results.html. What is
there already is not made again, so a study that was interrupted goes on. `--trial` is the same in small, in a minute.
Needs the extras eval, search and report.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mergetool
from scripts.studies.pages import write_page

from .answers import compared, read_matrix
from .estimators import CALIBRATION, compare, scaling
from .models import Training, prepare
from .skills import SKILLS, write_tasks
from .table import pictures, render

ARITHMETIC: dict[str, Any] = {"method": "task-arithmetic", "weight": {"search": [0.0, 1.5], "init": 0.3333}}
TIES: dict[str, Any] = {
    "method": "ties",
    "density": {"search": [0.1, 1.0], "step": 0.1, "shared": True},  # on a grid: what a density needs is known again
    "weight": {"search": [0.1, 1.5]},
}


@dataclass(frozen=True)
class Search:
    """One search of the study."""

    name: str
    estimator: dict[str, Any]
    algorithm: str = "cma-es"
    inner: dict[str, Any] = field(default_factory=lambda: dict(ARITHMETIC))
    population: int = 16
    generations: int = 12
    seed: int = 0


def irt(kind: str, size: int, calibration: int = CALIBRATION) -> dict[str, Any]:
    # without the guard: the estimator itself is to be seen
    return {"kind": kind, "items": size, "calibration": calibration, "guard": False}


CALIBRATED = Search("gmp-irt, 50", irt("gmp-irt", 50))
MATRIX = Search("matrix", {"kind": "full"}, "sobol", population=64, generations=1)


def main_searches(seed: int) -> list[Search]:
    """What is compared over several seeds: everything asked, against few items."""
    return [
        Search(f"{name}{f', seed {seed}' if seed else ''}", estimator, seed=seed)
        for name, estimator in {
            "full": {"kind": "full"},
            CALIBRATED.name: CALIBRATED.estimator,
            "gmp-irt, 20, calibration 4": irt("gmp-irt", 20, 4),
            "weighted mean, 20": {"kind": "weighted", "items": 20},
        }.items()
    ]


def other_searches() -> list[Search]:
    """Every estimator and two sizes, several objectives, TIES, another optimiser, soft scores; one seed."""
    made = []
    for size in (20, 50):
        kinds = ("gmp-irt", "p-irt", "mp-irt", "gp-irt")
        made += [
            Search(f"mean of random items, {size}", {"kind": "mean", "subset": "random", "items": size}),
            Search(f"weighted mean, {size}", {"kind": "weighted", "items": size}),
            *(Search(f"{kind}, {size}", irt(kind, size)) for kind in kinds),
        ]
    return [
        *made,
        Search("gmp-irt, 100", irt("gmp-irt", 100)),
        Search("gmp-irt, 50, soft", irt("gmp-irt", 50) | {"signal": "soft"}),
        Search("gmp-irt, 50, ga", irt("gmp-irt", 50), "ga"),
        Search("gmp-irt, 50, nsga2", irt("gmp-irt", 50), "nsga2"),
        Search("gmp-irt, 50, ties", irt("gmp-irt", 50), inner=TIES),
    ]


class Study:
    """A folder of models, tasks and searches."""

    def __init__(self, folder: Path, *, trial: bool, num_items: int) -> None:
        self.folder, self.trial = folder, trial
        write_tasks(folder / "tasks", 60 if trial else num_items)
        training = Training(hidden=32, num_layers=2, pretrain_steps=40, finetune_steps=20) if trial else Training()
        prepare(folder / "models", training, print)

    def run(self, search: Search) -> Path:
        """Search, unless that was done; the folder of the search."""
        found = self.found(search)
        output = found.with_suffix("")
        if not output.exists():
            result = mergetool.run(self.recipe(search), output=output, cache=self.folder / "cache")
            print(search.name, *result.notes, sep="\n  ", flush=True)
        return found

    def found(self, search: Search) -> Path:
        """Where a search's journal and report are."""
        return self.folder / "runs" / f"{search.name.replace(', ', '-').replace(' ', '-')}.search"

    def recipe(self, search: Search) -> dict[str, Any]:
        models = self.folder / "models"
        smaller = {"population": 4, "generations": 2} if self.trial and search is not MATRIX else {}
        estimator = dict(search.estimator)
        if self.trial and "items" in estimator:
            estimator["items"] //= 5
        return {
            "base": str(models / "base"),
            "models": {skill: str(models / skill) for skill in SKILLS},
            "merge": {
                "method": "merge3",
                "inner": search.inner,
                "tasks": [{"name": skill, "include": str(self.folder / "tasks")} for skill in SKILLS],
                "search": {
                    "algorithm": search.algorithm,
                    "population": search.population,
                    "generations": search.generations,
                    "batch_size": 128,
                }
                | smaller,
                "estimator": estimator,
            },
            "compute": {"seed": search.seed},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=2000, help="items of each task, half of them for the final report")
    parser.add_argument("--seeds", type=int, default=3, help="how often the main comparison is made")
    parser.add_argument("--trial", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(asked.folder.absolute(), trial=asked.trial, num_items=asked.items)
    results: dict[str, Any] = {"main": [], "searches": {}}
    gather(study, [*main_searches(0), *other_searches()], results)
    matrix = read_matrix(study.run(MATRIX), study.found(CALIBRATED))
    results["estimators"] = compare(
        matrix, seeds=1 if asked.trial else 5, calibrations=(0, CALIBRATION, 2 * CALIBRATION)
    )
    results["scaling"] = scaling(matrix, seeds=1 if asked.trial else 4)
    for seed in range(1, 1 if asked.trial else asked.seeds):
        gather(study, main_searches(seed), results)
    write(study.folder, results)
    write_page(study.folder / "results.html", "Evolving merges with few items", render(results), pictures(results))
    print(render(results))


def gather(study: Study, searches: list[Search], results: dict[str, Any]) -> None:
    """Run searches, the first of them with full evaluation, and add what they found."""
    exact = study.found(searches[0])
    repeated = {search.name for search in main_searches(searches[0].seed)}
    for search in {search.name: search for search in searches}.values():
        found = study.run(search)
        if not search.seed:
            results["searches"][search.name] = json.loads((found / "report.json").read_text())
        if search.name in repeated:
            results["main"].append({"name": search.name, "seed": search.seed} | compared(found, exact))
        write(study.folder, results)


def write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "results.md").write_text(render(results))


if __name__ == "__main__":
    main()
