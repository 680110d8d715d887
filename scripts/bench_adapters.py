#!/usr/bin/env python3
"""Time adapters that are made: extraction against mergekit's, and merges of adapters with the shapes of an 8B Llama.

    scripts/bench_adapters.py DIR                              both, with models made in DIR (7 GB)
    scripts/bench_adapters.py DIR --peer mergekit-extract-lora       extraction also by mergekit 0.1.5, in turn
    scripts/bench_adapters.py DIR --layers 2 --only extract          the same widths, fewer layers

Extraction: a bfloat16 Llama of 336M parameters (24 layers) and a fine-tune of it, whose changes have decaying singular
values; rank 32. The loss of a module is the length (Frobenius norm) of what its factors leave out, over that of its
change. Merging: eight adapters of rank 16 on all linear layers, and no base on the disk. Wall clock, processor time and
peak memory are those of whole processes, start-up counted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

# torch is imported only in child processes: a child's peak memory counts what its parent held when it was forked.
ROOT = Path(__file__).resolve().parents[1]
RANK = 32
MERGES = {
    "linear": ({"method": "linear"}, None),
    "linear, rank 32": ({"method": "linear"}, RANK),
    "tsv-merge": ({"method": "tsv-merge"}, None),
    "ties, rank 32": ({"method": "ties", "density": 0.2}, RANK),
}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda text: Path(text).absolute(), help="for models, outputs and results")
    parser.add_argument("--peer", type=Path, help="mergekit-extract-lora of an environment with mergekit==0.1.5")
    parser.add_argument("--only", choices=("extract", "merge"), help="one of the two")
    parser.add_argument("--merges", nargs="+", choices=list(MERGES), default=list(MERGES), help="these merges")
    parser.add_argument("--layers", type=int, help="fewer layers (default: 24 to extract from, 32 to merge)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each command; the fastest counts (default 1)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    if options.only != "merge":
        lines += extraction(options)
    if options.only != "extract":
        lines += merges(options)
    print("\n".join(lines))


def extraction(options: argparse.Namespace) -> list[str]:
    models, out = options.folder / f"models-{options.layers or 24}", options.folder / "out"
    make(MAKE_MODELS, models, options.layers or 24)
    recipe = {"base": "base", "models": {"tuned": "tuned"}, "merge": {"method": "passthrough"}}
    commands = {"mergetool": own(models, out, recipe | {"output": {"kind": "adapter", "rank": RANK}})}
    if options.peer:
        asked = ["--model", models / "tuned", "--base-model", models / "base", "--out-path", out, "--max-rank", RANK]
        commands["mergekit"] = [options.peer, *asked]
    timings: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    losses = {}
    for _ in range(options.runs):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            timings[name].append(measured(command, models))
            told = subprocess.check_output([sys.executable, "-c", LOSSES, str(models), str(out)], text=True)
            losses[name] = json.loads(told)
    lines = ["| extraction | s | CPU s | MiB | loss: median | most |", "|---" * 6 + "|"]
    for name, runs in timings.items():
        wall, cpu, peak = (min(each) for each in zip(*runs, strict=True))
        shares = losses[name].values()
        lost = f"{statistics.median(shares):.6f} | {max(shares):.6f}"
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {lost} |")
    if options.peer:
        ratios = [
            min(run[kind] for run in timings["mergekit"]) / min(run[kind] for run in timings["mergetool"])
            for kind in (0, 1)
        ]
        worst = max(losses["mergetool"][name] / losses["mergekit"][name] for name in losses["mergekit"])
        lines += ["", f"times faster: {ratios[0]:.1f} (CPU {ratios[1]:.1f}); loss over the peer's: at most {worst:.6f}"]
    return [*lines, ""]


def merges(options: argparse.Namespace) -> list[str]:
    layers = options.layers or 32
    adapters, out = options.folder / f"adapters-{layers}", options.folder / "out"
    make(MAKE_ADAPTERS, adapters, layers)
    lines = ["| eight adapters | s | CPU s | MiB | MiB planned |", "|---" * 5 + "|"]
    for name in options.merges:
        merge, rank = MERGES[name]
        output = {"kind": "adapter"} | ({} if rank is None else {"rank": rank})
        recipe = {"models": {f"a{i}": {"adapter": f"a{i}"} for i in range(8)}, "merge": merge, "output": output}
        command, runs = own(adapters, out, recipe), []
        for _ in range(options.runs):
            shutil.rmtree(out, ignore_errors=True)
            runs.append(measured(command, adapters))
        wall, cpu, peak = (min(each) for each in zip(*runs, strict=True))
        plan = [sys.executable, "-m", "mergetool", "plan", "recipe.yaml", "--json"]
        planned = json.loads(subprocess.check_output(plan, cwd=adapters, env=environment(), text=True))["peak_memory"]
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {planned / MIB:.0f} |")
    return lines


def own(folder: Path, out: Path, recipe: dict) -> list[object]:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return [sys.executable, "-m", "mergetool", "run", folder / "recipe.yaml", "-o", out]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def measured(command: list[object], folder: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds, and peak resident MiB of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [str(each) for each in command], cwd=folder, env=environment(), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if process_code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed ({process_code}): {' '.join(map(str, command))}")
    peak = usage.ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, peak


def make(code: str, folder: Path, layers: int) -> None:
    if not folder.exists():
        print(f"making {folder}", file=sys.stderr)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, "-c", code, str(partial), str(layers)], check=True)
        partial.rename(folder)


MAKE_MODELS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

folder, layers, hidden, inner, vocabulary = Path(sys.argv[1]), int(sys.argv[2]), 1024, 2304, 32000
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
    "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocabulary,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
generator = torch.Generator().manual_seed(0)

def drawn(*shape):
    return torch.randn(shape, generator=generator)

base, tuned = {}, {}
for i in range(layers):
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for name, (m, n) in shapes.items():
        key, s = f"model.layers.{i}.{name}.weight", 0.1 * torch.arange(1, 257) ** -0.6
        base[key] = 0.02 * drawn(m, n)
        tuned[key] = base[key] + (drawn(m, 256) / m**0.5 * s) @ (drawn(256, n) / n**0.5) + 1e-4 * drawn(m, n)
    for name in ("input_layernorm", "post_attention_layernorm"):
        base[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
for name in ("model.embed_tokens.weight", "lm_head.weight"):
    base[name] = 0.02 * drawn(vocabulary, hidden)
base["model.norm.weight"] = torch.ones(hidden)
for name, state in {"base": base, "tuned": base | tuned}.items():
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(config))
    save_file({key: value.bfloat16() for key, value in state.items()}, folder / name / "model.safetensors")
"""

MAKE_ADAPTERS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

folder, layers, hidden, kv, inner, rank = Path(sys.argv[1]), int(sys.argv[2]), 4096, 1024, 14336, 16
shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
shapes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
config = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "somebody/llama-8b", "r": rank,
    "lora_alpha": 2 * rank, "target_modules": sorted(shapes), "bias": "none", "lora_dropout": 0.0,
    "inference_mode": True,
}
for number in range(8):
    generator, state = torch.Generator().manual_seed(number), {}
    for i in range(layers):
        for name, (m, n) in shapes.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            key = f"base_model.model.model.layers.{i}.{block}.{name}"
            state[f"{key}.lora_A.weight"] = (torch.randn(rank, n, generator=generator) / n**0.5).bfloat16()
            state[f"{key}.lora_B.weight"] = (0.01 * torch.randn(m, rank, generator=generator)).bfloat16()
    (folder / f"a{number}").mkdir(parents=True)
    (folder / f"a{number}" / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / f"a{number}" / "adapter_model.safetensors", {"format": "pt"})
"""

LOSSES = """
import json, sys
from pathlib import Path
from safetensors import safe_open

models, out = map(Path, sys.argv[1:])
base, tuned = (safe_open(models / name / "model.safetensors", "pt") for name in ("base", "tuned"))
made, lost = safe_open(out / "adapter_model.safetensors", "pt"), {}
for key in made.keys():
    if key.endswith(".lora_A.weight"):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = tuned.get_tensor(f"{name}.weight").double() - base.get_tensor(f"{name}.weight").double()
        b, a = (made.get_tensor(key.replace("lora_A", half)).double() for half in ("lora_B", "lora_A"))
        if change.any():
            lost[name] = float((change - b @ a).norm() / change.norm())
print(json.dumps(lost))
"""

if __name__ == "__main__":
    main()
