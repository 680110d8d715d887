"""The study's results as a page of Markdown, and as plots."""

from pathlib import Path
from typing import Any


def render(results: dict[str, Any]) -> str:
    """Tables of searches, estimators and scaling."""
    parts = [_searches(results["searches"])]
    if "estimators" in results:
        parts.append(_estimators(results["estimators"]))
    if "scaling" in results:
        parts.append(_scaling(results["scaling"]))
    return "\n".join(parts)


def _rows(heads: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows)]) + "\n"


def _searches(searches: dict[str, Any]) -> str:
    first = next(iter(searches.values()))
    tasks = [task["name"] for task in first["tasks"]]
    rows = [
        [row["name"], *(f"{score:.3f}" for score in row["report"]), f"{row['report_mean']:.3f}", "", "", ""]
        for row in first["compared"]
    ]
    for name, facts in searches.items():
        winner, spent = facts["winner"], facts["spent"]
        estimate = sum(winner["estimate"]) / len(tasks)
        cost = (f"{estimate - winner['search_mean']:+.3f}", f"{spent['searching']:,}", f"{spent['reduction']:.1f}")
        scores = (f"{score:.3f}" for score in (*winner["report"], winner["report_mean"]))
        rows.append([f"**{name}**", *scores, *cost])
    heads = ["report items", *tasks, "mean", "estimate - search score", "items", "times fewer"]
    seconds = {name: facts["seconds"] for name, facts in searches.items()}
    shares = [s["merge"] / s["evaluate"] for s in seconds.values() if s["evaluate"] > 1.0]
    told = f"Merging took {min(shares):.2f} to {max(shares):.2f} of the time of evaluating.\n" if shares else ""
    return "## Searches\n\n" + _rows(heads, rows) + "\n" + told + _front(searches)


def _front(searches: dict[str, Any]) -> str:
    fronts = {name: facts for name, facts in searches.items() if facts["front"]}
    text = ""
    for name, facts in fronts.items():
        tasks = [task["name"] for task in facts["tasks"]]
        rows = [
            [m["recipe"], *(f"{s:.3f}" for s in m["search"]), *(f"{s:.3f}" for s in m["report"])]
            for m in facts["front"]
        ]
        heads = ["member", *(f"{task}, search" for task in tasks), *(f"{task}, report" for task in tasks)]
        text += f"\n### Front of {name}\n\n" + _rows(heads, rows)
    return text


def _estimators(found: dict[str, Any]) -> str:
    kinds = list(next(iter(found.values())))
    rows = [[size, *(f"{part[k]['error']:.3f} / {part[k]['rank']:.2f}" for k in kinds)] for size, part in found.items()]
    return "\n## Mean absolute error / rank correlation against full evaluation\n\n" + _rows(["items", *kinds], rows)


def _scaling(rows: list[dict[str, Any]]) -> str:
    heads = ["pool", "candidates", "asked", "items spent", "full", "times fewer", "score lost"]
    counted = ("pool", "candidates", "asked", "spent", "full")
    cells = [[*(f"{r[key]:,}" for key in counted), f"{r['reduction']:.1f}", f"{r['lost']:.4f}"] for r in rows]
    return "\n## Simulated with the fitted model\n\n" + _rows(heads, cells)


def plots(folder: Path, results: dict[str, Any]) -> None:
    """Accuracy against items spent; error against subset size."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, facts in results["searches"].items():
        left.plot(facts["spent"]["searching"], facts["winner"]["report_mean"], "o", label=name)
    left.set(xscale="log", xlabel="items answered while searching", ylabel="mean score on report items")
    left.legend(fontsize=6, frameon=False)
    sizes = [int(size) for size in results["estimators"]]
    for kind in next(iter(results["estimators"].values())):
        right.plot(sizes, [results["estimators"][str(size)][kind]["error"] for size in sizes], "o-", label=kind)
    right.set(xscale="log", xlabel="items asked", ylabel="mean absolute error")
    right.legend(frameon=False)
    figure.savefig(folder / "study.png", dpi=150)
