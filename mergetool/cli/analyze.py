"""`mergetool analyze RECIPE`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli.commands import named
from mergetool.cli.progress import ProgressBar
from mergetool.cli.show import manner, plain, say, table

if TYPE_CHECKING:
    from mergetool.analysis.result import Analysis

_MODELS = ("model", "norm", "relative", "share_changed", "kinship", "share_of_sum", "density_90", "effective_rank")
_PAIRS = ("a", "b", "cosine", "kinship", "opposed")
_DESCENT = ("model", "rows", "loss_base", "loss_tuned", "alignment", "preconditioned", "step", "linearity")
_TABLES = (
    ("Models", _MODELS, "models"),
    ("Pairs", _PAIRS, "pairs"),
    ("Task vectors beside the gradient at the base", _DESCENT, "descent"),
    ("Share of what a task gains that each task vector brings", ("loss", "model", "crosstalk"), "crosstalk"),
    (
        "How alike what they say is, block by block (CKA, stitching)",
        ("a", "b", "block", "cka", "forth", "back"),
        "likeness",
    ),
    ("Losses along the merge", ("model", "scale", "loss"), "scales"),
    ("Along the run", ("model", "checkpoint", "length", "cosine"), "path"),
    ("Beside the weights", ("model", "file", "key", "reference", "value"), "settings"),
    ("Not in all models", ("tensor", "why", "models"), "missing"),
)
_MOST_ROWS = 20


def analyze(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write analysis.html and analysis.json there.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads (default: one per core).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Override one value, e.g. merge.density=0.3.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Rows of what a model was trained for (repeat).")
    ] = None,
    checkpoints: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="The checkpoints of a model's run (repeat).")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps what is measured on data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show what a recipe's models are to each other before they are merged, and what that advises."""
    from mergetool.recipe import load_recipe

    with ProgressBar(quiet=manner.quiet) as progress:
        asked = load_recipe(recipe, settings or ())
        from mergetool.api import analyze as look

        rows, runs = _paths("--data", data), _paths("--checkpoints", checkpoints)
        analysis = look(
            asked, workers=workers, progress=progress, output=output, data=rows, checkpoints=runs, cache=cache
        )
    for remark in analysis.facts["remarks"]:
        say(f"note: {remark}")
    if output is not None:
        say(f"written: {output / 'analysis.html'}, and analysis.json")
    if as_json:
        print(analysis.to_json())
    else:
        _show(analysis)


def _paths(flag: str, given: list[str] | None) -> dict[str, str | Path]:
    return {name: Path(path) for name, path in named(flag, given or (), "NAME=PATH", f"{flag} math=./math").items()}


def _show(analysis: "Analysis") -> None:
    """What people want to know, the most telling first."""
    print(plain("\n".join(analysis.summary)))
    for advice in analysis.advice:
        head = f"\n{advice['weight']}: {advice['title']}\n  {advice['why']}\n  {_evidence(advice['evidence'])}"
        print(plain(f"{head}\n  {advice['formula']}\n  fix: {advice['fix']}"))
    for title, columns, section in _TABLES:
        if section in analysis.sections and (rows := analysis.rows(section)):
            print(f"\n{title}")
            heads = [column.replace("_", " ") for column in columns]
            table(heads, [[_listed(row[column]) for column in columns] for row in _first(rows)])


def _first(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as people read; -v shows all."""
    if len(rows) <= _MOST_ROWS or manner.verbose:
        return rows
    say(f"{len(rows) - _MOST_ROWS} more rows: -v shows them all")
    return rows[:_MOST_ROWS]


def _evidence(evidence: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_listed(value)}" for name, value in evidence.items())


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}: {_figure(each)}" for key, each in value.items())
    return " ".join(map(str, map(_figure, value))) if isinstance(value, list) else str(_figure(value))


def _figure(value: Any) -> Any:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value
