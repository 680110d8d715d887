"""The study's results as tables and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Scores = Mapping[str, float]


def render(results: Mapping[str, Any]) -> str:
    """All results that are there, in Markdown."""
    experts = results["known task"]["experts"]
    known = {name: scores for name, scores in results["known task"].items() if name != "experts"}
    routed = results.get("routed", {})
    head = ("", *experts, "mean", "of experts", "worst task")
    rows = [("experts", *_scores(experts, experts))]
    rows += [(f"{name} (task known)", *_scores(scores, experts)) for name, scores in known.items()]
    for name, tasks in routed.items():
        for kind, label in (("strict", "task and class"), ("class", "class only")):
            scores = {task: each[kind] for task, each in tasks.items()}
            rows.append((f"mass, {name} ({label})" if name != "mass" else f"mass ({label})", *_scores(scores, experts)))
    parts = ["# Accuracy", _table(head, rows)]
    for name, tasks in routed.items():
        body = [(task, *(f"{each[key]:.3f}" for key in ("nearest", "chosen", "tasks"))) for task, each in tasks.items()]
        means = (sum(each[key] for each in tasks.values()) / len(tasks) for key in ("nearest", "chosen", "tasks"))
        body.append(("mean", *(f"{value:.3f}" for value in means)))
        parts += [f"# Routing: {name}", _table(("task", "nearest", "among the chosen", "tasks per sample"), body)]
    if found := results.get("routing", {}).get("base"):
        rows = [(name, f"{share:.3f}") for name, share in found.items() if name.startswith("all")]
        single = {name: share for name, share in found.items() if name not in dict(rows)}
        best = sorted(single, key=lambda name: -single[name])
        rows += [
            (f"best single matrix, l2: {best[0]}", f"{single[best[0]]:.3f}"),
            (f"worst single matrix, l2: {best[-1]}", f"{single[best[-1]]:.3f}"),
        ]
        parts += ["# Share of samples whose task is nearest, no data used", _table(("matrices", "share"), rows)]
    for group in ("size", "speed"):
        if found := results.get(group, {}).get("mass"):
            parts += [f"# {group.capitalize()}", _table(("", ""), [(key, str(value)) for key, value in found.items()])]
    return "\n\n".join(parts) + "\n"


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """accuracy.png: share of the experts' accuracy by method; routing.png: routing by each single matrix."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    experts = results["known task"]["experts"]
    scores = {f"{name} (task known)": each for name, each in results["known task"].items() if name != "experts"}
    scores |= {
        f"mass, {name}" if name != "mass" else name: {task: each["strict"] for task, each in tasks.items()}
        for name, tasks in results.get("routed", {}).items()
    }
    shares = {name: [each[task] / experts[task] for task in experts] for name, each in scores.items()}
    names = sorted(shares, key=lambda name: sum(shares[name]))
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(names) + 1), layout="constrained")
    axes.barh(names, [sum(shares[name]) / len(experts) for name in names], color="0.8")
    for task, name in enumerate(experts):
        axes.plot([shares[each][task] for each in names], names, "o", markersize=4, label=name)
    axes.set_xlabel("share of the expert's accuracy (bar: mean over tasks)")
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(folder / "accuracy.png", dpi=120)
    single = {name: share for name, share in results["routing"]["base"].items() if not name.startswith("all")}
    kinds: dict[str, list[float]] = {}
    for name, share in single.items():
        kinds.setdefault(name.split(".", 3)[3].removesuffix(".weight"), []).append(share)
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for kind, values in kinds.items():
        axes.plot(values, "o-", label=kind)
    axes.set_xlabel("layer")
    axes.set_ylabel("nearest task is right")
    axes.legend(fontsize="x-small")
    figure.savefig(folder / "routing.png", dpi=120)


def _scores(scores: Scores, experts: Scores) -> list[str]:
    shares = {task: scores[task] / experts[task] for task in experts}
    mean = sum(scores.values()) / len(scores)
    relative = sum(shares.values()) / len(shares)
    return [
        *(f"{scores[task]:.3f}" for task in experts),
        f"{mean:.3f}",
        f"{relative:.3f}",
        f"{min(shares.values()):.3f}",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
