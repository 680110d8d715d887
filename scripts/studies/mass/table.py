"""The study's results as tables and pictures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergetool.pages import Picture, lines
from mergetool.pages.colours import LIGHT
from mergetool.pages.plots import Draw, legend, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def pictures(results: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """Share of the experts' accuracy by method; routing by each single matrix."""
    experts = results["known task"]["experts"]
    scores = {f"{name} (task known)": each for name, each in results["known task"].items() if name != "experts"}
    scores |= {
        f"mass, {name}" if name != "mass" else name: {task: each["strict"] for task, each in tasks.items()}
        for name, tasks in results.get("routed", {}).items()
    }
    shares = {name: {task: each[task] / experts[task] for task in experts} for name, each in scores.items()}
    return {
        "Share of the experts' accuracy": [Picture(_methods(shares), size=(8, 0.3 * len(shares) + 1.2))],
        "Routing by single matrices": [Picture(_matrices(results["routing"]["base"]))],
    }


def _methods(shares: Mapping[str, Scores]) -> Draw:
    """A bar for the mean of each method, the best first, and a mark for each task."""
    means = {name: sum(each.values()) / len(each) for name, each in shares.items()}
    names = sorted(means, key=lambda name: -means[name])

    def draw(axes: "Axes") -> None:
        axes.barh(range(len(names)), [means[name] for name in names], color=LIGHT["line"], label="mean")
        for place, task in enumerate(shares[names[0]]):
            values = [shares[name][task] for name in names]
            axes.plot(values, range(len(names)), **style(place) | {"linestyle": ""}, label=task)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("share of the expert's accuracy")
        legend(axes)

    return draw


def _matrices(found: Scores) -> Draw:
    kinds: dict[str, list[float]] = {}
    for name, share in found.items():
        if not name.startswith("all"):
            kinds.setdefault(name.split(".", 3)[3].removesuffix(".weight"), []).append(share)
    curves = {kind: (list(range(len(values))), values) for kind, values in kinds.items()}
    return lines(curves, "layer", "share of samples whose task is nearest")


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
