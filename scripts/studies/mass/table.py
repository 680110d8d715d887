"""The study's results as tables."""

from collections.abc import Mapping, Sequence
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
        rows = [(name, f"{share:.3f}") for name, share in found.items() if "." not in name or name.startswith("all ")]
        single = {name: share for name, share in found.items() if name not in dict(rows)}
        best = sorted(single, key=lambda name: -single[name])
        rows += [
            (f"best matrix: {best[0]}", f"{single[best[0]]:.3f}"),
            (f"worst matrix: {best[-1]}", f"{single[best[-1]]:.3f}"),
        ]
        parts += ["# Share of samples whose task is nearest, no data used", _table(("matrices", "share"), rows)]
    for group in ("size", "speed"):
        if found := results.get(group, {}).get("mass"):
            parts += [f"# {group.capitalize()}", _table(("", ""), [(key, str(value)) for key, value in found.items()])]
    return "\n\n".join(parts) + "\n"


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
