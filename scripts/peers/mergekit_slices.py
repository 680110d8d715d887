#!/usr/bin/env python3
"""Write the numbers that mergekit gives for the recipes `theirs` of tests/peers/mergekit/slices.yaml.

mk/bin/python scripts/peers/mergekit_slices.py      # mk as scripts/peers/mergekit_reference.py says
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from mergekit_reference import PEERS, merge
from safetensors.numpy import save_file

sys.path.insert(0, str(PEERS))

from checkpoints import sample, summary, write_families


def main() -> None:
    cases = yaml.safe_load((PEERS / "mergekit" / "slices.yaml").read_text())
    numbers: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_families(folder)
        for case, recipes in cases.items():
            merged = merge(folder, case, recipes["theirs"])
            numbers[f"{case}/names"] = np.frombuffer("\n".join(sorted(merged)).encode(), np.uint8)
            numbers[f"{case}/samples"] = np.concatenate([sample(name, merged[name]) for name in sorted(merged)])
            numbers[f"{case}/summary"] = np.stack([summary(merged[name]) for name in sorted(merged)])
    metadata = {"mergekit": version("mergekit"), "torch": version("torch")}
    save_file(numbers, PEERS / "mergekit" / "slices.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
