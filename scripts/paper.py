"""Merges that do not fit here, on paper: bytes, peak memory and expected time from plans alone.

    python scripts/paper.py             eight models of 8B and two of 70B, on every machine of planning/duration.py
    python scripts/paper.py --measure   the same figures beside what runs take here (two cores; some minutes)

Plans are made from shapes without data (tensors on torch's `meta` device): nothing is read or written.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mergetool.planning import make_plan  # noqa: E402
from mergetool.planning.cost import estimate  # noqa: E402
from mergetool.planning.duration import MACHINES, expected_seconds  # noqa: E402
from mergetool.recipe import load_recipe  # noqa: E402
from mergetool.tensors.source import MemorySource  # noqa: E402
from mergetool.testing.toys import uniform, write  # noqa: E402


def llama(width: int, inner: int, layers: int, groups: int) -> dict[str, torch.Tensor]:
    """Shapes of a Llama 3 (key and value heads: `groups` of the width), bfloat16."""
    shapes = {"model.embed_tokens.weight": (128256, width), "lm_head.weight": (128256, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (width // groups, width) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, inner), f"{at}.input_layernorm.weight": (width,)}
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}


def plan_of(model: dict[str, torch.Tensor], count: int, method: dict[str, object]):
    names = [f"m{index}" for index in range(count)]
    base = method["method"] != "linear"
    document = {"models": dict.fromkeys(names, "on paper"), "merge": method} | ({"base": "on paper"} if base else {})
    held = [*(["base"] if base else []), *names]
    return make_plan(load_recipe(document), sources={name: MemorySource(model) for name in held})


def on_paper() -> None:
    cases = (("eight 8B", llama(4096, 14336, 32, 4), 8), ("two 70B", llama(8192, 28672, 80, 8), 2))
    print(
        "| merge | method | machine | GB read | GB written | peak GiB a process | minutes |\n"
        "|---|---|---|---|---|---|---|"
    )
    for label, model, count in cases:
        for method in ({"method": "linear"}, {"method": "ties", "density": 0.2}, {"method": "tsv-merge"}):
            plan = plan_of(model, count, method)
            for machine in MACHINES:
                processes = max(1, machine.devices)
                workers = max(1, machine.cores // processes)
                peak = estimate(plan, workers=min(workers, 16), memory=1 << 40).peak_memory / 2**30
                minutes = expected_seconds(plan, machine) / 60
                sizes = f"{plan.bytes_in / 1e9:.0f} | {plan.bytes_out / 1e9:.0f} | {peak:.1f}"
                print(f"| {label} | {method['method']} | {machine.name} | {sizes} | {minutes:.1f} |")


def measured() -> None:
    shapes = {f"model.layers.{layer}.mlp.weight": (4096, 2048) for layer in range(16)}
    print("| merge | expected s | measured s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, {name: drawn(name, shapes) for name in ("base", "a", "b", "c")})
        small = {f"model.layers.{layer}.mlp.weight": (768, 768) for layer in range(16)}
        write(folder, {name: drawn(name, small) for name in ("sbase", "sa", "sb", "sc")})
        for method in ("linear", "task-arithmetic", "dare-ties", "ties", "tsv-merge"):
            before = "s" if method == "tsv-merge" else ""
            base = {} if method == "linear" else {"base": f"{before}base"}
            models = {name: f"{before}{name}" for name in "abc"}
            recipe = folder / "r.yaml"
            recipe.write_text(json.dumps({**base, "models": models, "merge": {"method": method}}))
            expected = expected_seconds(make_plan(load_recipe(recipe)))
            command = [sys.executable, "-m", "mergetool", "run", str(recipe), "-o", str(folder / "out"), "--json"]
            begun = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment(folder))
            seconds = time.monotonic() - begun
            assert json.loads(done.stdout)["path"], done.stderr
            shutil.rmtree(folder / "out")
            print(f"| {method} | {expected:.1f} | {seconds:.1f} | {expected / seconds:.2f} |", flush=True)


def drawn(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: uniform(shape, name, key).bfloat16() for key, shape in shapes.items()}


def _environment(folder: Path) -> dict[str, str]:
    """Without one thread for torch, and without digests of earlier runs."""
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return kept | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run merges here and compare")
    measured() if parser.parse_args().measure else on_paper()
