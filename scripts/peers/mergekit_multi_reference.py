#!/usr/bin/env python3
"""Write the numbers that mergekit-multi gives for every file of tests/peers/mergekit/multi/.

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    mk/bin/python scripts/peers/mergekit_multi_reference.py

Runs mergekit-multi on checkpoints made by tests/peers/checkpoints.py, keeps a sample of each tensor of the last result
with its sum and norm, and writes tests/peers/mergekit/multi/outputs.safetensors.
"""

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from mergekit.scripts.multimerge import main as multimerge
from safetensors.numpy import save_file

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"
sys.path.insert(0, str(PEERS))
sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import sample, summary, write_families  # noqa: E402  (found through the lines above)
from mergekit_reference import read  # noqa: E402


def main() -> None:
    numbers: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_families(folder)
        for path in sorted((PEERS / "mergekit" / "multi").glob("*.yaml")):
            merged = merge(folder, path)
            numbers[f"{path.stem}/samples"] = np.concatenate([sample(name, merged[name]) for name in sorted(merged)])
            numbers[f"{path.stem}/summary"] = np.stack([summary(merged[name]) for name in sorted(merged)])
    metadata = {"mergekit": version("mergekit"), "torch": version("torch")}
    save_file(numbers, PEERS / "mergekit" / "multi" / "outputs.safetensors", metadata=metadata)


def merge(folder: Path, path: Path) -> dict[str, np.ndarray]:
    """Run mergekit-multi on one file, with `folder` current as its relative paths expect."""
    names = [document.get("name") for document in yaml.safe_load_all(path.read_text())]
    between, out = folder / path.stem / "between", folder / path.stem / "out"
    options = ["-I", str(between), "--out-path", str(out), "--no-copy-tokenizer", "--no-write-model-card"]
    with contextlib.chdir(folder):
        multimerge([str(path), *options], standalone_mode=False)
    return read(out if None in names else between / "end")


if __name__ == "__main__":
    main()
