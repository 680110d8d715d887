"""The report of a search as a page."""

from typing import TYPE_CHECKING, Any

from mergetool.pages import Chapter, Code, Column, Facts, Note, Page, Picture, Piece, Table, bars, points, render
from mergetool.pages.colours import LIGHT
from mergetool.pages.parts import Level
from mergetool.pages.plots import legend, style
from mergetool.tuning.report_data import verdict
from mergetool.units import timespan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WINNER = (
    ("items asked", "asked"),
    ("estimate", "estimate"),
    ("its standard error", "estimate_error"),
    ("all search items", "search"),
    ("report items", "report"),
)


def page(facts: dict[str, Any], recipe: str, title: str) -> str:
    """The page as HTML. Raises ModuleNotFoundError where the extra `report` is not installed."""
    spent = facts["spent"]
    told, lost = verdict(facts, facts["best_parent"]["recipe"])
    lead = (
        f"{spent['candidates']} candidates; {spent['searching']:,} items answered while searching, "
        f"{spent['reduction']:.1f} times fewer than asking every candidate everything ({spent['full_search']:,})."
    )
    seconds = facts["seconds"]
    times = Facts([("merging", timespan(seconds["merge"])), ("evaluating", timespan(seconds["evaluate"]))])
    level: Level = "bad" if lost else "good" if facts["best_parent"]["difference_low"] > 0 else "plain"
    intro: list[Piece] = [Note(f"{told[0].upper()}{told[1:]}.", level), times]
    chapters = [_scores(facts), _winner(facts, recipe), *_pictures(facts), _estimators(facts)]
    return render(Page(title, lead, chapters, intro))


def _scores(facts: dict[str, Any]) -> Chapter:
    rows = [
        (row["name"], *row["report"], row["report_mean"])
        for row in [facts["winner"] | {"name": "winner"}, *facts["compared"]]
    ]
    return Chapter(
        "Scores on items that took no part in the search",
        [Table(["", *_tasks(facts), Column("mean", "fixed")], rows, strong=[0])],
        "What the winner is worth: compare its row with those of its parents.",
    )


def _winner(facts: dict[str, Any], recipe: str) -> Chapter:
    rows = [(name, *facts["winner"][key]) for name, key in _WINNER]
    lead = "Its scores while searching and after; an estimate far above the score on report items was luck."
    return Chapter("The winner", [Table(["", *_tasks(facts)], rows), Code(recipe)], lead)


def _tasks(facts: dict[str, Any]) -> list[Column]:
    return [Column(task["name"], "fixed") for task in facts["tasks"]]


def _estimators(facts: dict[str, Any]) -> Chapter:
    columns: list[Column | str] = ["task", Column("asked", "count"), Column("of", "count"), "estimator"]
    columns += [Column("share of the mean", "fixed"), "error on held-out merges"]
    rows = [
        (task["name"], task["asked_items"], task["search_items"], task["estimator"], task.get("blend"), _errors(task))
        for task in facts["tasks"]
    ]
    lead = "How scores were estimated from few items, and how far off that was for merges whose scores are known."
    return Chapter("Estimators", [Table(columns, rows)], lead)


def _errors(task: dict[str, Any]) -> str | None:
    return ", ".join(f"{name} {error:.3f}" for name, error in task.get("held_out_errors", {}).items()) or None


def _pictures(facts: dict[str, Any]) -> list[Chapter]:
    chapters = [_convergence(facts)]
    if len(facts["front"]) > 1:
        chapters.insert(0, _front(facts))
    if sum("search_mean" in trial for trial in facts["trials"]) > 1:
        chapters.append(_estimates(facts))
    return [*chapters, _items(facts)]


def _convergence(facts: dict[str, Any]) -> Chapter:
    fitness = [trial["fitness"] for trial in facts["trials"] if "fitness" in trial]
    best = [max(fitness[: place + 1]) for place in range(len(fitness))]

    def draw(axes: "Axes") -> None:
        axes.plot(range(1, len(fitness) + 1), fitness, "o", ms=3, color=LIGHT["muted"], label="candidates")
        axes.step(range(1, len(best) + 1), best, where="post", color=style(0)["color"], marker="", label="best so far")
        level = facts["winner"]["search_mean"]
        axes.axhline(level, color=style(2)["color"], lw=1, ls="--", label="winner on all search items")
        axes.set(xlabel="candidates tried", ylabel="estimated score")
        legend(axes)

    lead = "A curve that still rises at its end asks for more generations; one that is flat for long, for fewer."
    picture = Picture(draw, "Estimated score of each candidate, in the order they were tried.")
    return Chapter("Convergence", [picture], lead)


def _estimates(facts: dict[str, Any]) -> Chapter:
    known = [trial for trial in facts["trials"] if "search_mean" in trial]
    cloud = [trial["search_mean"] for trial in known], [trial["fitness"] for trial in known]
    draw = points({"candidates": cloud}, "score on all search items", "estimate", diagonal=True)
    picture = Picture(draw, size=(5.5, 4))
    return Chapter("Estimated and full scores", [picture], "The nearer to the dashed line, the better the estimates.")


def _front(facts: dict[str, Any]) -> Chapter:
    """What the scores of the first two tasks cost each other."""
    tried = [trial["estimate"] for trial in facts["trials"] if "estimate" in trial]
    members = sorted(member["search"][:2] for member in facts["front"])
    first, second = (task["name"] for task in facts["tasks"][:2])

    def draw(axes: "Axes") -> None:
        cloud = [e[0] for e in tried], [e[1] for e in tried]
        axes.plot(*cloud, "o", ms=3, color=LIGHT["muted"], label="candidates (estimates)")
        front = [m[0] for m in members], [m[1] for m in members]
        axes.plot(*front, color=style(0)["color"], label="front (all search items)")
        axes.set(xlabel=f"score: {first}", ylabel=f"score: {second}")
        legend(axes)

    rows = [(member["recipe"], *member["search"]) for member in facts["front"]]
    pieces: list[Piece] = [
        Table([Column("recipe", "code"), *_tasks(facts)], rows, "Each can be merged from its recipe."),
        Picture(draw, "The first two tasks."),
    ]
    lead = "Candidates that no other one beats on every task: choose by the task that matters most to you."
    return Chapter("Pareto front", pieces, lead)


def _items(facts: dict[str, Any]) -> Chapter:
    stages = {stage: count for stage, count in facts["spent"]["items"].items() if stage != "report"}
    parts = {stage: [count, 0] for stage, count in stages.items()}
    parts["asking everything"] = [0, facts["spent"]["full_search"]]
    picture = Picture(bars(parts, ["this search", "every candidate, everything"], "items answered"), size=(8, 2.2))
    return Chapter("Items answered", [picture], "What the estimates saved.")
