#!/usr/bin/env python3
"""Write the numbers that mergekit gives for every recipe of tests/peers/mergekit/cases.yaml.

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    mk/bin/python scripts/peers/mergekit_reference.py [CASE ...]

Runs mergekit on checkpoints made by tests/peers/checkpoints.py, keeps a sample of each output tensor
with its sum and norm, and writes tests/peers/mergekit/outputs.safetensors; with names of cases only their numbers are
made again.
"""

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"
sys.path.insert(0, str(PEERS))

from checkpoints import sample, summary, write_families  # noqa: E402  (found through the line above)


def main() -> None:
    cases = yaml.safe_load((PEERS / "mergekit" / "cases.yaml").read_text())
    wanted = sys.argv[1:] or list(cases)
    outputs = PEERS / "mergekit" / "outputs.safetensors"
    numbers: dict[str, np.ndarray] = load_file(outputs) if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_families(folder)
        for case in wanted:
            print(case, file=sys.stderr)
            merged = merge(folder, case, cases[case])
            numbers[f"{case}/samples"] = np.concatenate([sample(name, merged[name]) for name in sorted(merged)])
            numbers[f"{case}/summary"] = np.stack([summary(merged[name]) for name in sorted(merged)])
    metadata = {"mergekit": version("mergekit"), "torch": version("torch")}
    save_file(numbers, outputs, metadata=metadata)


def merge(folder: Path, case: str, recipe: dict[str, object]) -> dict[str, np.ndarray]:
    """What mergekit makes of one recipe."""
    return read(run_merge_in(folder, case, recipe))


def run_merge_in(folder: Path, case: str, recipe: dict[str, object]) -> Path:
    """Run mergekit on one recipe, with `folder` current as its relative paths expect. Returns the result's folder."""
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    with contextlib.chdir(folder):
        run_merge(MergeConfiguration.model_validate(recipe), f"out/{case}", options)
    return folder / "out" / case


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as float32 (bfloat16 widens exactly)."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            out |= {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118
    return dict(pair for name, tensor in out.items() for pair in apart(name, tensor))


def apart(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Mixtral's experts under the names that checkpoints have: mergekit writes them stacked, gate and up in one."""
    layer, _, rest = name.partition("mlp.")
    if rest == "gate.weight":
        return [(f"{layer}block_sparse_moe.gate.weight", tensor)]
    if rest not in ("experts.gate_up_proj", "experts.down_proj"):
        return [(name, tensor)]
    kinds = (
        {"w2": tensor} if rest == "experts.down_proj" else dict(zip(("w1", "w3"), np.split(tensor, 2, 1), strict=True))
    )
    return [
        (f"{layer}block_sparse_moe.experts.{expert}.{kind}.weight", one)
        for kind, stacked in kinds.items()
        for expert, one in enumerate(stacked)
    ]


if __name__ == "__main__":
    main()
