#!/usr/bin/env python3
"""Write the numbers that mergekit gives for every file of tests/peers/mergekit/files.yaml.

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    mk/bin/python scripts/peers/mergekit_files.py

As mergekit_reference.py does; results have layers of their own numbers, so each case says what its tensors are called.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from mergekit_reference import PEERS, merge
from safetensors.numpy import save_file

from checkpoints import sample, summary, write_families  # isort: skip


KEPT = 24  # elements of each tensor


def main() -> None:
    cases = yaml.safe_load((PEERS / "mergekit" / "files.yaml").read_text())
    numbers: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        write_families(Path(name))
        for case, recipe in cases.items():
            for tensor, values in merge(Path(name), case, recipe).items():
                numbers[f"{case}/{tensor}"] = np.concatenate([summary(values), sample(tensor, values)[:KEPT]])
    save_file(numbers, PEERS / "mergekit" / "files.safetensors", {"mergekit": version("mergekit")})


if __name__ == "__main__":
    main()
