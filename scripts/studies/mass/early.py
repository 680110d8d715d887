"""What `early` spares, and what it costs: time, answers, confidence, unknown inputs.

    python -m scripts.studies.mass.early FOLDER [--set first] [--steps 40] [--samples 100]

FOLDER is that of the study (python -m scripts.studies.mass), or a new one. Each router answers the same rows of all
tasks; those that tell unknown inputs are calibrated with some rows of each task. Writes early.json and early.md to it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mergetool
from mergetool.bundle.calibrate import calibrate
from mergetool.bundle.mass_model import MassModel

from .experts import MAX_LENGTH, encode
from .study import BATCH, Study, begun, encoder
from .unknown import Measured, figures, speed, strange

ROUTERS: dict[str, dict[str, Any]] = {
    "{}": {},
    "{early: 8}": {"early": 8},
    "{early: 12}": {"early": 12},
    "{early: 16}": {"early": 16},
    "{unknown: nearest}": {"unknown": "nearest"},
    "{unknown: nearest, early: 12}": {"unknown": "nearest", "early": 12},
    "{unknown: nearest, early: 16}": {"unknown": "nearest", "early": 16},
}
ROWS = 50
"""Of each task, to calibrate with."""


def opened(study: Study, name: str) -> MassModel:
    """The bundle with this router, calibrated where that teaches it unknown inputs."""
    router = ROUTERS[name]
    merge: dict[str, object] = {"method": "mass", "router": router}
    made = study.make("-".join(["early", *map(str, router.values())]), merge, heads=True)
    model = mergetool.load_bundle(made)
    model.tokenizer().model_max_length = MAX_LENGTH
    if "unknown" in router:
        train = {task.name: task.splits["train"][:ROWS] for task in study.tasks}
        calibrate(model, [{"text": text, "task": task} for task, rows in train.items() for text, _ in rows])
    return model


def answers(study: Study, model: MassModel) -> list[dict[str, Any]]:
    """What it says of all test inputs, in batches of all tasks, and whether that is right."""
    every = zip(*map(study.rows, study.tasks), strict=True)
    rows = [(task.name, *row) for several in every for task, row in zip(study.tasks, several, strict=True)]
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        answer = model(**encode(study.tokenizer, [text for _, text, _ in part]))
        said = zip(part, answer.task, answer.logits.argmax(1).tolist(), answer.known, answer.probability, strict=True)
        for (truth, _, label), task, number, known, sure in said:
            right = {"task": task == truth, "strict": (task, number) == (truth, label)}
            found.append({"answer": (task, number), "known": known, "sure": sure, **right})
    return found


def judged(rows: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of answers, beside those of the router that reads inputs whole."""
    same = sum(one["answer"] == other["answer"] for one, other in zip(rows, whole, strict=True))
    right = {key: sum(row[key] for row in rows) / len(rows) for key in ("task", "strict", "known")}
    return {"same answer": same / len(rows)} | right | figures(rows, "sure")


def measure(study: Study) -> dict[str, dict[str, float]]:
    """All figures by router, and the speeds of a task that is known and of the base."""
    models = {name: opened(study, name) for name in ROUTERS}
    known = {task.name: [text for text, _ in study.rows(task)] for task in study.tasks}
    others = strange(study.tokenizer, known, study.num_samples)
    said = {name: answers(study, model) for name, model in models.items()}
    results: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        results[name] = judged(said[name], said["{}" if model.unknown is None else "{unknown: nearest}"])
        if model.unknown is not None:
            measured = Measured(model, study.tokenizer)
            results[name] |= {f"refused: {kind}": measured.refused(texts) for kind, texts in others.items()}
    told = partial(models["{}"], tasks=[study.tasks[0].name])
    timed: dict[str, Callable[..., Any]] = {"base": encoder(study.folder / "base"), "task known": told, **models}
    seconds = speed(timed, study.tokenizer, study.tasks)
    for name, least in seconds.items():
        results.setdefault(name, {})["of the base's speed"] = seconds["base"] / least
    return results


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """As in the README."""
    keys = ["of the base's speed", *(key for key in results["{unknown: nearest}"] if key != "of the base's speed")]
    lines = [["router", *keys], ["---"] * (len(keys) + 1)]
    lines += [[name, *(f"{found[key]:.3f}" if key in found else "" for key in keys)] for name, found in results.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    study = begun(__doc__, steps=40, samples=100)
    results = measure(study)
    (study.folder / "early.json").write_text(json.dumps(results, indent=1) + "\n")
    (study.folder / "early.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
