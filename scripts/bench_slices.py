#!/usr/bin/env python3
"""Peak memory of a stack of two models against that of their mean: Llama 8B's shapes, three layers, bfloat16.

    python scripts/bench_slices.py FOLDER        needs 17 GB there; models stay, results are removed

Peaks are those of whole processes (start-up included), the largest resident size.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 4096, 14336, 1024, 128256, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
RECIPES = {
    "linear": {"merge": {"method": "linear"}},
    "stack": {"merge": {"method": "passthrough"}, "slices": [{"a": [0, 3]}, {"b": [0, 3]}]},
    "stack, blended in the middle": {
        "merge": {"method": "linear"},
        "slices": [{"a": [0, 2]}, {"a": [2, 3], "b": [0, 1]}, {"b": [1, 3]}],
    },
}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    for number, name in enumerate("ab"):
        if not (folder / name / "config.json").exists():
            write_model(folder / name, number)
    for name, sections in RECIPES.items():
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps({"models": {each: each for each in "ab"}, **sections}))
        seconds, peak = run(recipe, folder / "out")
        written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
        print(f"{name:30} {seconds:6.1f} s  peak {peak:5.0f} MiB  wrote {written / 1e9:.1f} GB", flush=True)
        shutil.rmtree(folder / "out")


def run(recipe: Path, out: Path) -> tuple[float, float]:
    """Seconds, and the peak in MiB."""
    command = [sys.executable, "-m", "mergetool", "run", recipe, "-o", out, "--overwrite"]
    watch = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    watch += "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", watch, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    code, peak = map(int, done.stdout.split())
    if code:
        sys.exit(done.stderr)
    return time.perf_counter() - started, peak / (2**20 if sys.platform == "darwin" else 2**10)


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KEYS, HIDDEN),
            ("self_attn.v_proj", KEYS, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            found[f"{place}{name}.weight"] = (rows, columns)
        found |= {f"{place}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_model(folder: Path, seed: int) -> None:
    """A model in one file, of one block of random numbers again and again."""
    import numpy as np

    block = np.random.default_rng(seed).normal(0, 0.02, 2**22).astype("<f4").view("<u4") >> 16
    data = block.astype("<u2").tobytes()
    header, offset = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        while offset:
            file.write(data[: min(offset, len(data))])
            offset -= min(offset, len(data))
    (folder / "config.json").write_text(json.dumps(CONFIG))


if __name__ == "__main__":
    main()
