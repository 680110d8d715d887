"""The study's results as Markdown, and as pictures."""

from typing import Any

from mergetool.pages import Picture, lines
from mergetool.pages.plots import Points

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
        text += f"\n### Pareto front of {name}\n\n" + _rows(heads, rows)
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


def pictures(results: dict[str, Any]) -> dict[str, list[Picture]]:
    """Score against items spent; error and rank correlation against subset size."""
    searches = results["searches"]
    _, *parents, uniform = next(iter(searches.values()))["compared"]
    scores: dict[str, Points] = {
        name: ([facts["spent"]["searching"]], [facts["winner"]["report_mean"]]) for name, facts in searches.items()
    }
    ends = [min(x[0] for x, _ in scores.values()), max(x[0] for x, _ in scores.values())]
    scores["best parent"] = (ends, [max(row["report_mean"] for row in parents)] * 2)
    scores["uniform merge"] = (ends, [uniform["report_mean"]] * 2)
    found = {
        "Score and cost": [
            Picture(lines(scores, "items answered while searching", "mean score on report items", logx=True))
        ]
    }
    rows = [row for row in results.get("estimators", ()) if row["calibration"] == CALIBRATION]
    if rows:
        labels = ("mean absolute error", "rank correlation")
        found["Estimators"] = [_against_size(rows, place, label) for place, label in enumerate(labels)]
    return found


def _against_size(rows: list[dict[str, Any]], place: int, label: str) -> Picture:
    asked = [row["items"] for row in rows]
    curves = {kind: (asked, [row[kind][place] for row in rows]) for kind in KINDS}
    return Picture(lines(curves, "items asked of each task", label, logx=True))
