"""The report as one HTML page that needs nothing else: pictures are inside it."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

from mergetool.tuning.report_data import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
pre { background: #f4f4f4; padding: 1rem; overflow: auto } .loud { background: #fde8e8; border-left: 4px solid #c00;
padding: .6rem 1rem; font-weight: bold }
svg { max-width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ facts.spent.candidates }} candidates; {{ "{:,}".format(facts.spent.searching) }} items answered while searching,
{{ "%.1f"|format(facts.spent.reduction) }} times fewer than asking every candidate everything
({{ "{:,}".format(facts.spent.full_search) }}).
Merging took {{ "%.1f"|format(facts.seconds.merge) }} s, evaluating {{ "%.1f"|format(facts.seconds.evaluate) }} s.</p>
<p{% if lost %} class="loud"{% endif %}>{{ verdict }}.</p>
<h2>Scores on items that took no part in the search</h2>
<table><tr><th></th>{% for task in facts.tasks %}<th>{{ task.name }}</th>{% endfor %}<th>mean</th></tr>
{% for row in [dict(facts.winner, name="winner")] + facts.compared %}<tr><td>{{ row.name }}</td>
{% for score in row.report %}<td>{{ "%.3f"|format(score) }}</td>{% endfor %}
<td>{{ "%.3f"|format(row.report_mean) }}</td></tr>{% endfor %}</table>
<h2>The winner</h2>
<table><tr><th></th>{% for task in facts.tasks %}<th>{{ task.name }}</th>{% endfor %}</tr>
{% for label, key in [("items asked", "asked"), ("estimate", "estimate"), ("its standard error", "estimate_error"),
("all search items", "search"), ("report items", "report")] %}<tr><td>{{ label }}</td>
{% for score in facts.winner[key] %}<td>{{ "%.3f"|format(score) }}</td>{% endfor %}</tr>{% endfor %}</table>
<pre>{{ recipe }}</pre>
{% if facts.front %}<h2>Pareto front</h2>
<table><tr><th>recipe</th>{% for task in facts.tasks %}<th>{{ task.name }}</th>{% endfor %}</tr>
{% for member in facts.front %}<tr><td>{{ member.recipe }}</td>
{% for score in member.search %}<td>{{ "%.3f"|format(score) }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% for heading, picture in pictures %}<h2>{{ heading }}</h2>{{ picture|safe }}{% endfor %}
<h2>Estimators</h2>
<table><tr><th>task</th><th>asked</th><th>of</th><th>estimator</th><th>share of the mean</th>
<th>error on held-out merges</th></tr>
{% for task in facts.tasks %}<tr><td>{{ task.name }}</td><td>{{ task.asked_items }}</td><td>{{ task.search_items }}</td>
<td>{{ task.estimator }}</td><td>{{ "%.2f"|format(task.blend) if "blend" in task else "-" }}</td>
<td>{% for name, error in task.get("held_out_errors", {}).items() %}{{ name }} {{ "%.3f"|format(error) }}
{% endfor %}</td></tr>{% endfor %}</table>
</body></html>
"""


def page(facts: dict[str, Any], recipe: str, title: str) -> str:
    """The page as HTML. Raises ModuleNotFoundError where the extra `report` is not installed."""
    import jinja2
    import matplotlib as mpl

    environment = jinja2.Environment(autoescape=True)
    environment.globals["dict"] = dict
    with mpl.rc_context({"svg.hashsalt": "mergetool", "svg.fonttype": "none"}):
        pictures = [(heading, _picture(draw, facts)) for heading, draw in _pictures(facts)]
    told, lost = verdict(facts, facts["best_parent"]["recipe"])
    told = f"{told[0].upper()}{told[1:]}"
    page = environment.from_string(_PAGE)
    return page.render(facts=facts, recipe=recipe, title=title, pictures=pictures, verdict=told, lost=lost)


def _pictures(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    chosen = [("Convergence", _convergence), ("Items answered", _items)]
    if sum("search_mean" in trial for trial in facts["trials"]) > 1:
        chosen.insert(1, ("Estimated and full scores", _estimates))
    if len(facts["front"]) > 1:
        chosen.insert(0, ("IncrementalHash of the first two tasks", _front))
    return chosen


def _picture(draw: Any, facts: dict[str, Any]) -> str:
    """One picture as SVG text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, facts)
    out = BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue().decode()
    return text[text.index("<svg") :]


def _convergence(axes: "Axes", facts: dict[str, Any]) -> None:
    fitness = [trial["fitness"] for trial in facts["trials"] if "fitness" in trial]
    best = [max(fitness[: place + 1]) for place in range(len(fitness))]
    axes.plot(range(1, len(fitness) + 1), fitness, ".", color="#999", label="candidates")
    axes.step(range(1, len(best) + 1), best, where="post", color="#06c", label="best so far")
    axes.axhline(facts["winner"]["search_mean"], color="#080", lw=1, ls="--", label="winner on all search items")
    axes.set(xlabel="candidates tried", ylabel="estimated score")
    axes.legend(frameon=False)


def _estimates(axes: "Axes", facts: dict[str, Any]) -> None:
    known = [trial for trial in facts["trials"] if "search_mean" in trial]
    axes.plot([t["search_mean"] for t in known], [t["fitness"] for t in known], "o", color="#06c", alpha=0.6)
    ends = [min(t["search_mean"] for t in known), max(t["search_mean"] for t in known)]
    axes.plot(ends, ends, color="#999", lw=1)
    axes.set(xlabel="score on all search items", ylabel="estimate")


def _front(axes: "Axes", facts: dict[str, Any]) -> None:
    tried = [trial["estimate"] for trial in facts["trials"] if "estimate" in trial]
    axes.plot([e[0] for e in tried], [e[1] for e in tried], ".", color="#bbb", label="candidates (estimates)")
    members = sorted(member["search"][:2] for member in facts["front"])
    axes.plot([m[0] for m in members], [m[1] for m in members], "o-", color="#06c", label="front (all search items)")
    axes.set(xlabel=facts["tasks"][0]["name"], ylabel=facts["tasks"][1]["name"])
    axes.legend(frameon=False)


def _items(axes: "Axes", facts: dict[str, Any]) -> None:
    stages = {stage: count for stage, count in facts["spent"]["items"].items() if stage != "report"}
    left = 0
    for stage, count in stages.items():
        axes.barh("this search", count, left=left, label=stage)
        left += count
    axes.barh("every candidate, everything", facts["spent"]["full_search"], color="#bbb")
    axes.set(xlabel="items answered")
    axes.legend(frameon=False)
