#!/usr/bin/env python3
"""Time the alignment kernels: cost per model, against the pairwise loops of the paper, and at the size of a ViT-B.

    python scripts/bench_c2m3.py models        one iteration for 2 to 12 MLPs of width 512
    python scripts/bench_c2m3.py loops         an iteration for five such MLPs (mean of a run), against loops over pairs
    python scripts/bench_c2m3.py vit           three ViT-B checkpoints in planted orders, 10 % noise: the whole command

Seconds are those of the process on all its cores (CPU time), with the wall clock beside them. The loops are the
published algorithm written down plainly: dense permutation matrices, gradients pair by pair, one assignment after the
other, and a bounded scalar search of at most 20 evaluations of the pairwise objective for the step.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import fminbound, linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mergetool.arch.match import resolve
from mergetool.kernels.frank_wolfe import AlignmentSettings, align
from mergetool.kernels.matching import MatchingProblem
from mergetool.kernels.permute import Element

WIDTHS = (64, 512, 512, 512, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "loops", "vit"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    timed = {"models": time_models, "loops": time_loops, "vit": lambda: time_vit(arguments.threads)}
    timed[arguments.what]()


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


def problem_of(states: list[dict[str, torch.Tensor]]) -> MatchingProblem:
    spec = resolve("mlp", {name: tuple(x.shape) for name, x in states[0].items()})
    return MatchingProblem.of(spec.spaces, spec.layouts(), models=states)


def time_models() -> None:
    states = trained_mlps(12)
    print("models  CPU s per iteration  per model")
    for num_models in (2, 3, 4, 6, 8, 10, 12):
        cpu, _ = ours(states[:num_models])
        print(f"{num_models:6d}  {cpu:19.3f}  {cpu / num_models:9.4f}")


def ours(states: list[dict[str, torch.Tensor]], iterations: int = 5, tolerance: float = 0.0) -> tuple[float, float]:
    """CPU and wall seconds of one iteration, on average."""
    settings = AlignmentSettings(starts=1, polish=False, iterations=iterations, tolerance=tolerance)
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


def time_vit(threads: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        wanted = plant_vits(Path(name))
        merge_vits(Path(name), threads)
        merged = load_file(Path(name) / "merged" / "model.safetensors")
    missed = max(float((merged[tensor] - x).abs().max()) for tensor, x in wanted.items())
    print(f"largest difference from the mean in the planted orders: {missed:.2g}")


def plant_vits(folder: Path) -> dict[str, torch.Tensor]:
    """Three checkpoints, one random network in planted orders and noise; their mean in the order of the first."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(folder / "clean")
    clean = load_file(folder / "clean" / "model.safetensors")
    config = json.loads((folder / "clean" / "config.json").read_text())
    spec = resolve(None, {tensor: tuple(x.shape) for tensor, x in clean.items()}, config)
    axes = {tensor: spec.tensors[tensor].axes for tensor in clean}
    planted = [Element.random(spec.spaces, torch.Generator().manual_seed(i)) for i in range(3)]
    mean = {tensor: torch.zeros_like(x) for tensor, x in clean.items()}
    for i, element in enumerate(planted):
        generator = torch.Generator().manual_seed(10 + i)
        moved = {}
        for tensor, x in clean.items():
            noisy = x + 0.1 * x.std(correction=0) * torch.randn(x.shape, generator=generator)
            moved[tensor] = element.apply(noisy, axes[tensor]).contiguous()
            mean[tensor] += planted[0].apply(noisy, axes[tensor]) / 3
        (folder / f"model{i}").mkdir()
        save_file(moved, folder / f"model{i}" / "model.safetensors", {"format": "pt"})
        shutil.copy(folder / "clean" / "config.json", folder / f"model{i}")
    return mean


def merge_vits(folder: Path, threads: int) -> None:
    """Run the command on them, and tell what it took."""
    recipe = {
        "models": {f"model{i}": str(folder / f"model{i}") for i in range(3)},
        "merge": {"method": "c2m3", "align": {"anchor": "model0"}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "mergetool", "run", "recipe.yaml", "-o", "merged", "--workers", str(threads)]
    with Clock() as clock:
        subprocess.run(command, cwd=folder, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = (folder / "model0" / "model.safetensors").stat().st_size
    report = json.loads((folder / "merged" / "alignment" / "report.json").read_text())
    print(
        f"three networks of {size / 4e6:.1f}M parameters: {clock.wall:.0f} s wall, "
        f"{used.ru_utime + used.ru_stime:.0f} s CPU, {len(report['history'])} iterations; "
        f"peak memory {used.ru_maxrss / 2**10:.0f} MiB, {used.ru_maxrss * 2**10 / (3 * size):.2f} times the models"
    )


if __name__ == "__main__":
    main()
