"""Every method that needs no data on three sets of real fine-tunes: an encoder, vision transformers, language models.

    python -m scripts.studies.catalogue FOLDER [--sets encoder ...] [--tasks NAME ...] [--only GLOB ...]
                                        [--steps 300] [--samples 300]

Fine-tunes are made in FOLDER unless they are there, and so are results: results.json, and results.md made of it. A
candidate whose result is there is not merged again; with `--only` only those whose name matches are.
"""

import json
import shutil
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from transformers.utils import logging

import mergetool
from mergetool.methods import registry
from scripts.studies.mass.study import arguments, made

from .candidates import Sections, candidates
from .fine_tunes import SETS_OF_MODELS, TASKS, FineTunes, Sizes, prepare
from .table import EXPERTS, SECONDS, accuracies, render


def merged(models: FineTunes, sections: Sections, output: Path) -> float:
    """The processor time, in seconds, that the merge took."""
    recipe = {
        "base": str(models.base),
        "models": {name: str(path) for name, path in models.experts.items()},
        "check": {"missing": "base"},  # transformers no longer saves the buffer of positions of the published encoder
        "output": {"path": str(output)},
        **sections,
    }
    if registry()[sections["merge"]["method"]].needs_base == "unused":
        del recipe["base"], recipe["check"]
    started = time.process_time()
    mergetool.run(recipe, overwrite=True)
    return time.process_time() - started


def asked(models: FineTunes, of: Path | None = None) -> dict[str, str]:
    """A digit for every test input of every task: of one model, or of each task's own expert."""
    answers = {name: models.right(name, of or own) for name, own in models.experts.items()}
    return {name: "".join("1" if right else "0" for right in each.tolist()) for name, each in answers.items()}


def study(folder: Path, sets: list[str], sizes: Sizes, only: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in sets:
        models, known = prepare(name, folder, sizes), results.setdefault(name, {})
        if EXPERTS not in known:
            known[EXPERTS] = asked(models)
        for called, sections in candidates():
            if called in known or not any(fnmatch(called, glob) for glob in only):
                continue
            output = folder / "merged"
            seconds = merged(models, sections, output)
            known[called] = {**asked(models, output), SECONDS: f"{seconds:.2f}"}
            path.write_text(json.dumps(results, indent=1))
            print(f"{name}: {called} ({seconds:.1f} s)", file=sys.stderr)
            shutil.rmtree(output)
    return results


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS_OF_MODELS, default=list(SETS_OF_MODELS))
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="of the encoder")
    parser.add_argument("--only", nargs="+", default=["*"], help="globs on what is compared")
    given = parser.parse_args()
    folder = made(given.folder)
    logging.disable_progress_bar()
    results = study(folder, given.sets, Sizes(given.steps, given.samples, tuple(given.tasks)), given.only)
    text = f"{accuracies(results)}\n{render(results)}"
    (folder / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
