#!/usr/bin/env python3
"""Write the rows that mergekit gives for every recipe of tests/peers/mergekit/vocabularies.yaml.

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    mk/bin/python scripts/peers/mergekit_vocabularies.py

Runs mergekit on the checkpoints of tests/peers/vocabularies.py, puts embeddings and heads in the order of the tokens'
texts (mergekit's numbers of new tokens vary from run to run), and writes tests/peers/mergekit/vocabularies.safetensors.
"""

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.tokensurgeon import main as tokensurgeon
from safetensors.numpy import load_file, save_file

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"
sys.path.insert(0, str(PEERS))

from vocabularies import ROWS, SPECIAL, by_token, write_transplant, write_vocabularies  # noqa: E402  (found through the line above)

NEW = 30
"""Tokens that only the donor of the transplant has: the first behind the special ones."""


def main() -> None:
    cases = yaml.safe_load((PEERS / "mergekit" / "vocabularies.yaml").read_text())
    numbers = {}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_vocabularies(Path())
        for case, recipe in cases.items():
            print(case, file=sys.stderr)
            options = MergeOptions(write_model_card=False, quiet=True)
            run_merge(MergeConfiguration.model_validate(recipe), f"out/{case}", options)
            read = load_file(f"out/{case}/model.safetensors")
            numbers |= {f"{case}/{key}": rows for key, rows in by_token(Path("out", case), read).items()}
        write_transplant(Path())
        for way in ("omp", "mean", "zero"):
            print(way, file=sys.stderr)
            tokensurgeon(["model", "donor", f"out/{way}", "--approximation-method", way], standalone_mode=False)
            read = load_file(f"out/{way}/model.safetensors")
            numbers |= {f"{way}/{name}": read[name][len(SPECIAL) :][:NEW] for name in ROWS}
    metadata = {"mergekit": version("mergekit"), "torch": version("torch")}
    save_file(numbers, PEERS / "mergekit" / "vocabularies.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
