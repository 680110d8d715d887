#!/usr/bin/env python3
"""Hold c2m3's search against the Frank-Wolfe of its authors, on networks trained from different seeds.

    git clone https://github.com/crisostomi/cycle-consistent-model-merging     # at ea1eca7
    pip install scikit-learn
    python scripts/peers/c2m3_reference.py . --width 64 --sets 8 --write
    python scripts/peers/c2m3_reference.py . --width 256 --sets 2

Trains sets of five MLPs on scikit-learn's digits, as scripts/studies/c2m3 does, lets the authors' functions align each
set from the identity and from their random start (Sinkhorn, three seeds), as long as they would (200 iterations),
rounds as they do, and values their permutations and ours by one objective. `--write` keeps the first set, in half
precision, and what the authors' code reaches on it, in tests/peers/c2m3.safetensors.
"""

import argparse
import ast
import logging
import sys
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mergetool.arch.match import resolve  # noqa: E402  (found through the line above)
from mergetool.kernels.frank_wolfe import AlignmentSettings, align  # noqa: E402
from mergetool.kernels.matching import MatchingProblem, objective  # noqa: E402
from mergetool.kernels.permute import Element  # noqa: E402
from mergetool.kernels.weight_matching import hard_point  # noqa: E402
from scripts.studies.c2m3.networks import MLP, Training, digits, train  # noqa: E402

State = dict[str, torch.Tensor]
MODELS = 5
TAKEN = {
    *("perm_rows", "perm_cols", "generalized_inner_product", "perm_indices_to_perm_matrix"),
    *("collect_perm_sizes", "initialize_perm_matrices", "initialize_perturbed_uniform", "sinkhorn_knopp"),
    *("project_gradients", "solve_linear_assignment_problem", "frank_wolfe_synchronized_matching"),
    *("collect_gradients_frank_wolfe_model_pair", "compute_grad_P_curr_sync", "compute_grad_P_prev_sync"),
    *("line_search_step_sync", "get_all_pairs_global_obj_sync", "get_global_obj_layerwise_sync"),
    *("compute_layer_similarity_sync", "update_perm_matrices_sync"),
}
STARTS = (("identity", 0), ("sinkhorn", 0), ("sinkhorn", 1), ("sinkhorn", 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="folder with the repository named above")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="number of the first set")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--starts", type=int, default=len(STARTS), help="how many of the authors' starts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = authors(arguments.clones / "cycle-consistent-model-merging" / "src" / "ccmm" / "matching")
    print(
        "set  theirs (identity, sinkhorn x 3)                     seconds    ours      seconds  ours / best of theirs"
    )
    for number in range(arguments.first, arguments.first + arguments.sets):
        states = networks(arguments.width, number)
        problem = problem_of(states)
        with Clock() as their_clock:
            theirs = [value(problem, run(states, *start)) for start in STARTS[: arguments.starts]]
        with Clock() as our_clock:
            ours = align(problem, AlignmentSettings()).objective
        told = " ".join(f"{reached:10.4f}" for reached in theirs)
        print(
            f"{number:3d}  {told}  {their_clock.seconds:8.1f}  {ours:10.4f}  {our_clock.seconds:7.1f}  "
            f"{ours / max(theirs) - 1:+.3%}",
            flush=True,
        )
        if arguments.write and number == 0:
            write(states, theirs)


class Clock:
    """CPU seconds of a block."""

    def __enter__(self) -> "Clock":
        self._started = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._started


def networks(width: int, number: int) -> list[State]:
    """Five trained MLPs, in half precision, which is what is kept of them."""
    data, states = digits(0), []
    for seed in range(MODELS * number, MODELS * (number + 1)):
        torch.manual_seed(seed)
        trained = train(MLP(data.pixels, width), data, Training(60), seed)
        states.append({name: x.half().float() for name, x in trained.items()})
    return states


def problem_of(states: list[State]) -> MatchingProblem:
    spec = resolve("mlp", {name: tuple(x.shape) for name, x in states[0].items()})
    return MatchingProblem.of(spec.spaces, spec.layouts(), models=states)


def functions(*paths: Path) -> dict[str, Any]:
    """What the search needs of these scripts, in one namespace, without what they import or run."""
    names: dict[str, Any] = {"torch": torch, "np": np, "logging": logging, "pylogger": logging.getLogger("theirs")}
    names |= {"tqdm": lambda steps, **_: steps, "fminbound": scipy.optimize.fminbound}
    names |= {"partial": __import__("functools").partial, "linear_sum_assignment": scipy.optimize.linear_sum_assignment}
    future = ast.parse("from __future__ import annotations").body
    for path in paths:
        found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in TAKEN]
        exec(compile(ast.Module([*future, *found], []), str(path), "exec"), names)
    for name in ("sinkhorn_knopp", "initialize_perturbed_uniform"):
        defaults = names[name].__defaults__
        names[name].__defaults__ = tuple("cpu" if value == "cuda" else value for value in defaults)
    return names


def authors(folder: Path) -> Any:
    """Their n-model matching: from models, a start and a seed to index vectors by model and layer."""
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # they ask for it by name
    files = ("utils", "weight_matching", "frank_wolfe_matching", "frank_wolfe_sync_matching")
    known = functions(*(folder / f"{name}.py" for name in files))

    def run(states: list[State], start: str, seed: int) -> list[list[torch.Tensor]]:
        torch.manual_seed(seed)
        symbols = "abcde"[: len(states)]
        found, _ = known["frank_wolfe_synchronized_matching"](
            params=dict(zip(symbols, states, strict=True)),
            perm_spec=mlp(len(states[0]) // 2),
            symbols=list(symbols),
            combinations=list(combinations(symbols, 2)),
            max_iter=200,
            initialization_method=start,
            device="cpu",
        )
        return [list(found[symbol].values()) for symbol in symbols]

    return run


def mlp(layers: int) -> SimpleNamespace:
    """Their description of an MLP, by our names of its tensors."""
    axes: dict[str, tuple[str | None, ...]] = {}
    for layer in range(layers):
        rows = f"P_{layer}" if layer < layers - 1 else None
        axes[f"layers.{layer}.weight"] = (rows, f"P_{layer - 1}" if layer else None)
        axes[f"layers.{layer}.bias"] = (rows,)
    groups = {f"P_{layer}": [(f"layers.{layer}.weight", 0)] for layer in range(layers - 1)}
    return SimpleNamespace(layer_and_axes_to_perm=axes, perm_to_layers_and_axes=groups)


def value(problem: MatchingProblem, permutations: list[list[torch.Tensor]]) -> float:
    """Our objective where every model's layers are put into these orders (theirs lead from the universe to a model)."""
    names = [name for name, space in problem.spaces.items() if space.symmetry != "fixed"]
    elements = []
    for orders in permutations:
        index = dict(zip(names, (torch.argsort(order) for order in orders), strict=True))
        elements.append(Element(problem.spaces, index, {}))
    return objective(problem, hard_point(problem, elements))


def write(states: list[State], theirs: list[float]) -> None:
    tensors = {f"{i}/{name}": x.half() for i, state in enumerate(states) for name, x in state.items()}
    tensors["theirs"] = torch.tensor(theirs, dtype=torch.float64)
    save_file(tensors, ROOT / "tests" / "peers" / "c2m3.safetensors")


if __name__ == "__main__":
    main()
