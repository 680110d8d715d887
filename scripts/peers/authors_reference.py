#!/usr/bin/env python3
"""Write the numbers that authors' own code, and FusionBench, give for methods that are no others' peers.

    git clone https://github.com/duguodong7/pcb-merging        # at 5897888
    git clone https://github.com/zongzhenyang/CABS             # at a41f891
    git clone https://github.com/nik-dim/tall_masks            # at d10af8b
    git clone https://github.com/uiuctml/Localize-and-Stitch   # at 109d206
    git clone https://github.com/Zhengsh123/FREE-Merging       # at 36c0f41
    python -m venv fb && fb/bin/pip install torch==2.13.0 fusion-bench==0.2.33
    fb/bin/python scripts/peers/authors_reference.py .

Merges checkpoints made by tests/peers/checkpoints.py, in float64, keeps a sample of each tensor with its sum and norm,
and writes tests/peers/authors.safetensors. Of scripts that do more than define functions, only the functions are run.
"""

import argparse
import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

PEERS = Path(__file__).resolve().parents[2] / "tests" / "peers"
sys.path.insert(0, str(PEERS))

from checkpoints import sample, summary, tensors  # noqa: E402  (found through the line above)

State = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="numbers of authors' own code")
    parser.add_argument("clones", type=Path, help="folder with the repositories named above")
    clones = parser.parse_args().clones
    base = state("base")
    deltas = [{name: value - base[name] for name, value in state(model).items()} for model in "abcd"]
    merged = {
        "magmax": magmax(base, deltas),
        "pcb": pcb(clones, base, deltas),
        "consensus": consensus(clones, base, deltas),
        "cabs": cabs(clones, base, deltas[:2]),
        "localize-and-stitch": stitched(clones, base, deltas),
        "free": free(clones, base, deltas),
        "opcm": opcm(base, deltas),
    }
    numbers: dict[str, np.ndarray] = {}
    for method, result in merged.items():
        arrays = {name: result[name].numpy() for name in sorted(result)}
        numbers[f"{method}/samples"] = np.concatenate([sample(name, array) for name, array in arrays.items()])
        numbers[f"{method}/summary"] = np.stack([summary(array) for array in arrays.values()])
    save_file(numbers, PEERS / "authors.safetensors", metadata={"fusion-bench": "0.2.33", "torch": torch.__version__})


def state(model: str) -> State:
    return {name: torch.from_numpy(array).double() for name, array in sorted(tensors("llama", model).items())}


def functions(path: Path, **instead: Any) -> dict[str, Any]:
    """What a script defines, without running the rest of it, methods of its classes too; some with others in place."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    names: dict[str, Any] = {"torch": torch, "np": np}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *found], []), str(path), "exec"), names)
    names.update(instead)
    return names


def flat(deltas: list[State]) -> torch.Tensor:
    return torch.stack([torch.cat([value.flatten() for value in delta.values()]) for delta in deltas])


def added(base: State, vector: torch.Tensor, factor: float) -> State:
    parts = vector.split([value.numel() for value in base.values()])
    return {
        name: value + factor * part.view(value.shape) for (name, value), part in zip(base.items(), parts, strict=True)
    }


def magmax(base: State, deltas: list[State]) -> State:
    from fusion_bench.method.magmax.magmax import _magmax_select

    chosen = _magmax_select(deltas)
    return {name: value + 0.5 * chosen[name] for name, value in base.items()}


def opcm(base: State, deltas: list[State]) -> State:
    """The loop over models and tensors is FusionBench's, without what it logs and evaluates."""
    import fusion_bench

    folder = Path(fusion_bench.__file__).parent / "method" / "opcm"
    svd = functions(folder / "utils.py")["svd"]
    run = functions(folder / "opcm.py", svd=svd)
    known = SimpleNamespace(previous_lambda_t=1.0, lambda_t=1.0)
    lengths = [length(deltas[0])]
    merged = {name: value + deltas[0][name] for name, value in base.items()}
    for delta in deltas[1:]:
        lengths.append(length(delta))
        for name, value in base.items():
            given = (known, merged[name], value, value + delta[name], name)
            kind = "merge_linear_weights" if "_proj" in name else "merge_other_parameters"
            merged[name] = run[kind](*given, 0.5) if "_proj" in name else run[kind](*given)
        raw = {name: merged[name] - value for name, value in base.items()}
        factor = float(np.mean(lengths)) / length(raw)
        merged = {name: value + factor * raw[name] for name, value in base.items()}
        known.previous_lambda_t = 1.0 / factor
    return merged


def length(vector: State) -> float:
    return float(torch.cat([value.flatten() for value in vector.values()]).norm())


def pcb(clones: Path, base: State, deltas: list[State]) -> State:
    merge = functions(clones / "pcb-merging" / "pcb-merging.py")["PCB_merge"]
    return added(base, merge(flat(deltas), pcb_ratio=0.1)[0], 1.2)


def consensus(clones: Path, base: State, deltas: list[State]) -> State:
    path = clones / "tall_masks" / "src" / "utils" / "tallmask_utils.py"
    masks = functions(path, log_wandb_mask_sparsity=lambda mask: None)["generate_task_masks"]
    start, vectors = flat([base])[0], flat(deltas)
    found = masks(vectors, start + vectors, start, tall_mask_lambda=0.4)
    return added(base, vectors.sum(0) * (found.sum(0) >= 2), 0.3)


def cabs(clones: Path, base: State, deltas: list[State]) -> State:
    path = clones / "CABS" / "src" / "roberta_glue_experiments" / "prune_task_vector.py"
    copies = [{name: value.clone() for name, value in delta.items()} for delta in deltas]
    left = functions(path)["block_random_pruning"](*copies, pruning_method="n:m", n=4, m=16)
    return {name: value + 1.2 * (left[0][name] + left[1][name]) for name, value in base.items()}


def stitched(clones: Path, base: State, deltas: list[State]) -> State:
    """Masks of the largest, rounded as the authors do, then averaged."""
    run = functions(clones / "Localize-and-Stitch" / "localize_utils.py")
    shares = SimpleNamespace(sparsity=0.05, sigmoid_bias=5)
    count = sum(value.numel() for value in base.values())
    masks = []
    for delta in deltas:
        vectors = list(delta.values())
        known = {"graft_args": shares, "num_params": count, "task_vectors": vectors, "trainable_parameters": vectors}
        masks.append([torch.sigmoid(patch).round() for patch in run["create_basepatch"](SimpleNamespace(**known))])
    shares_of = run["get_average_masks"](SimpleNamespace(masks=masks))
    return {
        name: value + sum(share[place] * delta[name] for share, delta in zip(shares_of, deltas, strict=True))
        for place, (name, value) in enumerate(base.items())
    }


def free(clones: Path, base: State, deltas: list[State]) -> State:
    """What is left once the slow waves are taken out (they count the few at a certain radius twice)."""
    path = clones / "FREE-Merging" / "merge_vit" / "src" / "task_vectors.py"
    split = functions(path)["cal_low_and_high_fft_for_tensor"]
    total = {name: sum(delta[name] for delta in deltas) for name in base}
    matrices = {name for name in base if "_proj" in name}
    slow = {name: split(SimpleNamespace(filter_ratio=0.6), total[name])[0] for name in matrices}
    means = {name: value / len(deltas) for name, value in total.items()}
    return {
        name: value + 0.5 * (total[name] - slow[name] if name in matrices else means[name])
        for name, value in base.items()
    }


if __name__ == "__main__":
    main()
