"""The same question of a small language model: three skills, merged with lines of text of each, and without.

    python -m scripts.studies.data.language FOLDER [--samples 300] [--rows 16 64 256]

Models and skills are those of the study of merge3, made in FOLDER/language unless they are there. Lines are as those
that the fine-tunes were trained on, and no held-out item occurs in them.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import mergetool
from mergetool.methods import registry
from scripts.studies.catalogue.fine_tunes import FineTunes, Sizes, prepare
from scripts.studies.data.__main__ import cases, table
from scripts.studies.merge3.skills import lines

SEED = 99


def write_rows(folder: Path, models: FineTunes, rows: int) -> None:
    """For each skill a file of lines."""
    for skill in models.experts:
        told = (json.dumps({"text": line}) for line in islice(lines(skill, SEED), rows))
        (folder / f"{skill}.jsonl").write_text("".join(f"{line}\n" for line in told))


def merged(folder: Path, models: FineTunes, merge: dict[str, Any], rows: int) -> float:
    """The seconds that it took."""
    recipe: dict[str, Any] = {"models": {name: str(path) for name, path in models.experts.items()}, "merge": merge}
    if registry()[merge["method"]].needs_base != "unused":
        recipe["base"] = str(models.base)
    if rows:
        recipe["calibration"] = {n: {"data": str(folder / f"{n}.jsonl"), "samples": rows} for n in models.experts}
    started = time.monotonic()
    mergetool.run(recipe, output=folder / "merged", overwrite=True, cache=folder / "kept" if rows else None)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=300, help="test items of every skill")
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 256], help="lines of each skill to merge with")
    given = parser.parse_args()
    folder = given.folder.absolute()
    models = prepare("language", folder, Sizes(samples=given.samples))
    write_rows(folder, models, max(given.rows))
    known = {
        "experts": {"seconds": 0, "right": {n: models.right(n, own).tolist() for n, own in models.experts.items()}}
    }
    for name, merge, rows in cases(given.rows):
        seconds = merged(folder, models, merge, rows)
        answers = {skill: models.right(skill, folder / "merged").tolist() for skill in models.experts}
        known[name] = {"seconds": seconds, "right": answers}
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)
    print(table(known, list(models.experts)))


if __name__ == "__main__":
    main()
