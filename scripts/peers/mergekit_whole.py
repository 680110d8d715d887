#!/usr/bin/env python3
"""Write whole checkpoints that mergekit makes of the recipes of tests/peers/mergekit/whole.yaml.

python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5
mk/bin/python scripts/peers/mergekit_whole.py
"""

import shutil
import tempfile
from pathlib import Path

import yaml
from mergekit_reference import PEERS, run_merge_in, write_families


def main() -> None:
    target = PEERS / "mergekit" / "whole"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        write_families(Path(name))
        for case, recipe in yaml.safe_load((PEERS / "mergekit" / "whole.yaml").read_text()).items():
            made = run_merge_in(Path(name), case, recipe)
            (weights,) = made.glob("*.safetensors")
            shutil.copy(weights, target / f"{case}.safetensors")


if __name__ == "__main__":
    main()
