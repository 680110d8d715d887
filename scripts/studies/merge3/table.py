"""The study's results as a page of Markdown, and as plots."""

from pathlib import Path
from typing import Any

from .estimators import CALIBRATION, KINDS


def render(results: dict[str, Any]) -> str:
    """Tables of searches, estimators and scaling."""
    parts = [_main(results["main"]), _searches(results["searches"])]
    if "estimators" in results:
        parts.append(_estimators(results["estimators"]))
    if "scaling" in results:
        parts.append(_scaling(results["scaling"]))
    return "\n".join(parts)


def _rows(heads: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows)]) + "\n"


def _main(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["name"].split(", seed")[0] for row in rows))
    heads = [
        "search",
        "seed",
        "report mean",
        "- best parent",
        "- uniform merge",
        "- full search",
        "items",
        "times fewer",
    ]
    cells = []
    for name in names:
        for row in (row for row in rows if row["name"].split(", seed")[0] == name):
            apart = [f"{row[key][0]:+.3f} ± {row[key][1]:.3f}" for key in ("best_parent", "uniform", "full")]
            mean = f"{row['report'][0]:.3f} ± {row['report'][1]:.3f}"
            cells.append([name, row["seed"], mean, *apart, f"{row['items']:,}", f"{row['reduction']:.1f}"])
    return "## Against full evaluation, over seeds\n\n" + _rows(heads, cells) + "\n"


def _searches(searches: dict[str, Any]) -> str:
    first = next(iter(searches.values()))
    tasks = [task["name"] for task in first["tasks"]]
    rows = [
        [_name(row["name"]), *(f"{score:.3f}" for score in row["report"]), f"{row['report_mean']:.3f}", "", "", ""]
        for row in first["compared"]
    ]
    for name, facts in searches.items():
        winner, spent = facts["winner"], facts["spent"]
        estimate = sum(winner["estimate"]) / len(tasks)
        cost = (f"{estimate - winner['search_mean']:+.3f}", f"{spent['searching']:,}", f"{spent['reduction']:.1f}")
        scores = (f"{score:.3f}" for score in (*winner["report"], winner["report_mean"]))
        rows.append([f"**{name}**", *scores, *cost])
    heads = ["report items", *tasks, "mean", "estimate - search score", "items", "fewer than all it tried"]
    return "## Searches\n\n" + _rows(heads, rows) + "\n" + _time(searches) + _front(searches)


def _name(who: str) -> str:
    return "uniform merge" if who == "start of the search" else who


def _time(searches: dict[str, Any]) -> str:
    """Merging against evaluating; searches whose answers were mostly known from others tell nothing."""
    shares = {
        name: facts["seconds"]["merge"] / facts["seconds"]["evaluate"]
        for name, facts in searches.items()
        if facts["seconds"]["evaluate"] > 1.0
    }
    told = ", ".join(f"{name}: {share:.2f}" for name, share in shares.items())
    return f"Time of merging, relative to that of evaluating: {told}.\n" if shares else ""


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
        text += f"\n### IncrementalHash of {name}\n\n" + _rows(heads, rows)
    return text


def _estimators(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    cells = [
        [row["calibration"], row["items"], *(f"{row[k][0]:.3f} / {row[k][1]:.2f}" for k in heads[2:])] for row in rows
    ]
    return "\n## Mean absolute error / rank correlation against full evaluation\n\n" + _rows(
        ["merges that calibrate", *heads[1:]], cells
    )


def _scaling(rows: list[dict[str, Any]]) -> str:
    heads = ["pool", "candidates", "asked", "items spent", "full", "times fewer", "score lost"]
    counted = ("pool", "candidates", "asked", "spent", "full")
    cells = [[*(f"{r[key]:,}" for key in counted), f"{r['reduction']:.1f}", f"{r['lost']:.4f}"] for r in rows]
    return "\n## Simulated with the fitted model\n\n" + _rows(heads, cells)


def plots(folder: Path, results: dict[str, Any]) -> None:
    """Accuracy against items spent; error and rank correlation against subset size."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for place, (name, facts) in enumerate(results["searches"].items()):
        left.plot(facts["spent"]["searching"], facts["winner"]["report_mean"], "os^"[place // 10], label=name)
    _, *parents, uniform = next(iter(results["searches"].values()))["compared"]
    left.axhline(max(row["report_mean"] for row in parents), color="0.5", ls=":", label="best parent")
    left.axhline(uniform["report_mean"], color="0.5", ls="--", label="uniform merge")
    left.set(xscale="log", xlabel="items answered while searching", ylabel="mean score on report items")
    left.xaxis.set_minor_formatter("")
    left.legend(fontsize=6, frameon=False, ncols=2, loc="center right")
    rows = [row for row in results["estimators"] if row["calibration"] == CALIBRATION]
    for panel, place, label in ((middle, 0, "mean absolute error"), (right, 1, "rank correlation")):
        for kind in KINDS:
            panel.plot([row["items"] for row in rows], [row[kind][place] for row in rows], "o-", label=kind)
        panel.set(xscale="log", xlabel="items asked of each task", ylabel=label)
        panel.set_xticks([row["items"] for row in rows], [row["items"] for row in rows], minor=False)
        panel.xaxis.set_minor_formatter("")
    middle.legend(frameon=False)
    figure.savefig(folder / "study.png", dpi=150)
