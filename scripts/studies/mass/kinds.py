"""All kinds of bundles on the same fine-tunes: accuracy, size, time.

    python -m scripts.studies.mass.kinds FOLDER [--set first] [--steps 300] [--samples 300]

FOLDER is that of the study (python -m scripts.studies.mass), or a new one. Writes kinds.json and kinds.md to it.
"""

import json
import time

import torch

import mergetool
from mergetool.bundle.mass_model import MassModel
from mergetool.bundle.verify import facts_about_bundle

from .__main__ import compressed, routed
from .experts import encode
from .study import BATCH, Study, begun

KINDS = {
    "mass": {"method": "mass"},
    "smile": {"method": "smile"},
    "smile, two experts a token": {"method": "smile", "gate": {"top_k": 2}},
    "twin": {"method": "twin"},
    "twin, a tenth of the directions": {"method": "twin", "rank": 0.1},
    "wemoe": {"method": "wemoe"},
    "emr": {"method": "emr"},
    "tall-masks": {"method": "tall-masks"},
    "tall-masks, margin 1": {"method": "tall-masks", "margin": 1.0},
}
HEADS = ("kind", "task known", "strict", "nearest task", "times the base", "build, s", "batch of 64, s")


def measured(study: Study, name: str, merge: dict[str, object], experts: dict[str, float]) -> dict[str, float]:
    """Means over tasks in shares of the experts' accuracy; size; seconds of process time."""
    started = time.process_time()
    bundle = study.make(f"kind-{name}", merge, heads=True)
    built = time.process_time() - started
    model = mergetool.load_bundle(bundle)
    told, found = compressed(study, model), routed(study, model)
    count = len(study.tasks)
    return {
        "task known": sum(told[task] / experts[task] for task in experts) / count,
        "strict": sum(found[task]["strict"] / experts[task] for task in experts) / count,
        "nearest task": sum(found[task]["nearest"] for task in experts) / count,
        "times the base": facts_about_bundle(bundle)["size_over_base"],
        "build, s": built,
        "batch of 64, s": seconds(study, model),
    }


@torch.inference_mode()
def seconds(study: Study, model: MassModel) -> float:
    """Least process time of a mixed batch."""
    texts = [study.rows(task)[index][0] for index in range(-(-BATCH // len(study.tasks))) for task in study.tasks]
    inputs, least = encode(study.tokenizer, texts[:BATCH]), float("inf")
    for _ in range(5):
        started = time.process_time()
        model(**inputs)
        least = min(least, time.process_time() - started)
    return least


def table(results: dict[str, dict[str, float]]) -> str:
    """As in the documentation."""
    lines = [HEADS, ("---",) * len(HEADS)]
    for name, found in results.items():
        digits = (3, 3, 3, 2, 1, 2)
        lines.append((name, *(f"{found[key]:.{n}f}" for key, n in zip(HEADS[1:], digits, strict=True))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    study = begun(__doc__)
    experts = study.results["known task"]["experts"]
    path = study.folder / "kinds.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, merge in KINDS.items():
        if name not in results:
            results[name] = measured(study, name, merge, experts)
            path.write_text(json.dumps(results, indent=1))
            print(name, results[name])
    (study.folder / "kinds.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
