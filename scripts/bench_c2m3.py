#!/usr/bin/env python3
"""Time the alignment kernels: cost per model, against the pairwise loops of the paper, and at the size of a ViT-B.

    python scripts/bench_c2m3.py models        one iteration for 2 to 12 MLPs of width 512
    python scripts/bench_c2m3.py loops         an iteration for five such MLPs (mean of a run), against loops over pairs
    python scripts/bench_c2m3.py vit           three networks of ViT-B's sizes in planted orders, 10 % noise

Seconds are those of the process on all its cores (CPU time), with the wall clock beside them. The loops are the
published algorithm written down plainly: dense permutation matrices, gradients pair by pair, one assignment after the
other, and a bounded scalar search of at most 20 evaluations of the pairwise objective for the step.
"""

import argparse
import resource
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import fminbound, linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mergetool.arch.match import resolve
from mergetool.kernels.frank_wolfe import Settings, align
from mergetool.kernels.matching import Problem, objective
from mergetool.kernels.permute import Element
from mergetool.kernels.weight_matching import hard_point

WIDTHS = (64, 512, 512, 512, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "loops", "vit"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"models": time_models, "loops": time_loops, "vit": time_vit}[arguments.what]()


class Clock:
    """CPU and wall seconds of a block."""

    def __enter__(self) -> "Clock":
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self._cpu, time.perf_counter() - self._wall


def trained_mlps(num_models: int) -> list[dict[str, torch.Tensor]]:
    """MLPs trained for a moment on scikit-learn's digits, so that their gradients look like real ones."""
    from scripts.studies.c2m3.networks import MLP, Training, digits, train

    data, states = digits(0), []
    for seed in range(num_models):
        torch.manual_seed(seed)
        states.append(train(MLP(WIDTHS[0], WIDTHS[1]), data, Training(8), seed))
    return states


def problem_of(states: list[dict[str, torch.Tensor]]) -> Problem:
    spec = resolve("mlp", {name: tuple(x.shape) for name, x in states[0].items()})
    return Problem.of(spec.spaces, spec.layouts(), models=states)


def time_models() -> None:
    states = trained_mlps(12)
    print("models  CPU s per iteration  per model")
    for num_models in (2, 3, 4, 6, 8, 10, 12):
        cpu, _ = ours(states[:num_models])
        print(f"{num_models:6d}  {cpu:19.3f}  {cpu / num_models:9.4f}")


def ours(states: list[dict[str, torch.Tensor]], iterations: int = 5, tolerance: float = 0.0) -> tuple[float, float]:
    """CPU and wall seconds of one iteration, on average."""
    settings = Settings(starts=1, polish=False, iterations=iterations, tolerance=tolerance)
    problem = problem_of(states)
    with Clock() as clock:
        found = align(problem, settings)
    return clock.cpu / len(found.history), clock.wall / len(found.history)


def time_loops() -> None:
    states = trained_mlps(5)
    cpu, wall = ours(states, iterations=100, tolerance=1e-6)
    loops = Loops([{name: x.double().numpy() for name, x in state.items()} for state in states])
    with Clock() as clock:
        loops.iterate()
    print(
        f"five MLPs of width 512, one iteration: ours {cpu:.2f} s CPU, {wall:.2f} s wall; "
        f"loops over pairs {clock.cpu:.2f} s CPU, {clock.wall:.2f} s wall; ratio {clock.cpu / cpu:.0f}"
    )


class Loops:
    """The published algorithm for an MLP: P[i][l] maps the universe to layer l of model i, dense."""

    def __init__(self, models: list[dict[str, np.ndarray]]) -> None:
        self.models = models
        self.depth = len(WIDTHS) - 1
        self.point = [[np.eye(width) for width in WIDTHS] for _ in models]  # inputs and outputs stay the identity

    def iterate(self) -> None:
        """One step: gradients, assignments, a line search, and the move."""
        slopes = self.gradients()
        vertex = [[np.eye(width) for width in WIDTHS] for _ in self.models]
        for i, slope in enumerate(slopes):
            for layer in range(1, self.depth):
                rows, columns = linear_sum_assignment(slope[layer], maximize=True)
                vertex[i][layer] = np.zeros_like(slope[layer])
                vertex[i][layer][rows, columns] = 1
        step = fminbound(lambda t: -self.value(self.between(vertex, t)), 0, 1, xtol=1e-3, maxfun=20)
        self.point = self.between(vertex, step)

    def gradients(self) -> list[list[np.ndarray]]:
        slopes = [[np.zeros((width, width)) for width in WIDTHS] for _ in self.models]
        for a, b in combinations(range(len(self.models)), 2):
            for i, j in ((a, b), (b, a)):
                for layer in range(self.depth):
                    self._add(slopes[i], i, j, layer)
        return slopes

    def _add(self, slope: list[np.ndarray], i: int, j: int, layer: int) -> None:
        ours, theirs = self.point[i], self.point[j]
        a, b = self.models[i][f"layers.{layer}.weight"], self.models[j][f"layers.{layer}.weight"]
        slope[layer + 1] += a @ ours[layer] @ theirs[layer].T @ b.T @ theirs[layer + 1]
        slope[layer] += a.T @ ours[layer + 1] @ theirs[layer + 1].T @ b @ theirs[layer]
        bias_a, bias_b = self.models[i][f"layers.{layer}.bias"], self.models[j][f"layers.{layer}.bias"]
        slope[layer + 1] += np.outer(bias_a, bias_b) @ theirs[layer + 1]

    def value(self, point: list[list[np.ndarray]]) -> float:
        total = 0.0
        for i, j in combinations(range(len(self.models)), 2):
            for layer in range(self.depth):
                rows = point[i][layer + 1] @ point[j][layer + 1].T
                columns = point[j][layer] @ point[i][layer].T
                a, b = self.models[i][f"layers.{layer}.weight"], self.models[j][f"layers.{layer}.weight"]
                total += np.trace(a.T @ rows @ b @ columns)
                total += self.models[i][f"layers.{layer}.bias"] @ rows @ self.models[j][f"layers.{layer}.bias"]
        return total

    def between(self, vertex: list[list[np.ndarray]], t: float) -> list[list[np.ndarray]]:
        return [
            [(1 - t) * p + t * d for p, d in zip(own, target, strict=True)]
            for own, target in zip(self.point, vertex, strict=True)
        ]


def time_vit() -> None:
    """ViT-B/16 as timm stores it: 86 million parameters."""
    shapes = vit_shapes()
    spec = resolve("timm-vit", shapes, {"num_heads": 12})
    generator = torch.Generator().manual_seed(0)
    clean = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    planted = [Element.random(spec.spaces, generator) for _ in range(3)]
    models = []
    for element in planted:
        noisy = {name: x + 0.002 * torch.randn(x.shape, generator=generator) for name, x in clean.items()}
        models.append({name: element.apply(x, spec.tensors[name].axes) for name, x in noisy.items()})
    del clean
    size = sum(x.numel() for x in models[0].values())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    problem = Problem.of(spec.spaces, spec.layouts(), models=models)
    with Clock() as clock:
        found = align(problem, Settings(starts=1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    best = objective(problem, hard_point(problem, [element.inverse() for element in planted]))
    print(
        f"three networks of {size / 1e6:.1f}M parameters: {len(found.history)} iterations, {clock.wall:.0f} s wall, "
        f"{clock.cpu:.0f} s CPU; objective {found.objective:.6g}, planted {best:.6g}; "
        f"peak memory {peak:.0f} MiB, of which {held:.0f} MiB before the alignment"
    )


def vit_shapes(depth: int = 12, dim: int = 768, hidden: int = 3072) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 197, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (1000, dim),
        "head.bias": (1000,),
    }
    for k in range(depth):
        block = f"blocks.{k}."
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", hidden, dim),
            ("mlp.fc2", dim, hidden),
        ):
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        shapes |= {f"{block}norm{k}.{kind}": (dim,) for k in (1, 2) for kind in ("weight", "bias")}
    return shapes


if __name__ == "__main__":
    main()
