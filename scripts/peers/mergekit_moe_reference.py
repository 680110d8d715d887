#!/usr/bin/env python3
"""Write what mergekit-moe makes of every file in tests/peers/mergekit/moe.yaml.

    python -m venv mk && mk/bin/pip install torch==2.13.0 transformers==5.24.0 mergekit==0.1.5
    mk/bin/python scripts/peers/mergekit_moe_reference.py

mergekit measures hidden states in bfloat16. Beside that (`NAME bfloat16`) they are measured in float32 here, by giving
its loader that dtype: what is compared then is what is measured, not how it is rounded.
"""

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build
from safetensors import safe_open
from safetensors.numpy import save_file

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"
sys.path.insert(0, str(PEERS))

from checkpoints import write_families  # noqa: E402  (found through the line above)
from mixtures import compared, write_tokenizers  # noqa: E402

LOAD = transformers.AutoModelForCausalLM.from_pretrained


def main() -> None:
    cases = yaml.safe_load((PEERS / "mergekit" / "moe.yaml").read_text())
    numbers: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_families(Path(name))
        write_tokenizers(Path(name))
        for case, config in cases.items():
            for dtype in ("float32", "bfloat16"):
                found = compared(made(config, Path(f"out/{case} {dtype}"), getattr(torch, dtype)))
                kept = found if case != "random" else {"digest": found["digest"]}
                numbers |= {f"{case} {dtype}/{key}": value for key, value in kept.items()}
    metadata = {"mergekit": version("mergekit"), "torch": version("torch"), "transformers": version("transformers")}
    save_file(numbers, PEERS / "mergekit" / "moe.safetensors", metadata=metadata)


def made(config: dict[str, object], out: Path, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Run mergekit-moe, measuring in this dtype; all tensors as float32."""

    def load(*arguments: object, **options: object) -> object:
        return LOAD(*arguments, **{**options, "torch_dtype": dtype, "device_map": "cpu"})

    transformers.AutoModelForCausalLM.from_pretrained = load
    build(MoEMergeConfig.model_validate(config), str(out), MergeOptions(copy_tokenizer=False))
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118
    return found


if __name__ == "__main__":
    main()
