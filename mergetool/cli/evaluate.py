"""`mergetool evaluate PATH`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli.against import refuse_idle
from mergetool.cli.answers import print_answer
from mergetool.cli.commands import DeviceMap, existing, ready, size
from mergetool.cli.progress import waiting
from mergetool.cli.show import say, table
from mergetool.errors import OutputError, RecipeError, SourceError

if TYPE_CHECKING:
    from mergetool.evaluate.options import TaskOptions
    from mergetool.evaluate.scores import Evaluation

_HEADS = ("task", "metric", "items", "score", "low", "high", "ece")
_OF_PARENTS = ("best_parent", "retention", "difference_low", "difference_high")
_OF_POINTS = ("x", "task", "items", "score", "low", "high", "loss")
_OF_BARRIERS = ("task", "error_barrier", "error_barrier_at", "loss_barrier", "loss_barrier_at", "best_score", "best_at")
_OF_PAIRS = ("a", "b", "task", "score", "low", "high", "better_alone", "kept")


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A model folder, or a recipe for --along and --pairs.")],
    tasks: Annotated[list[str], typer.Option(metavar="NAME", help="A task of lm-eval (repeat, or a,b,c).")],
    include: Annotated[str | None, typer.Option(metavar="FOLDER", help="Tasks of your own: YAML files.")] = None,
    metric: Annotated[str | None, typer.Option(help="Which metric counts (default: the task's first).")] = None,
    parent: Annotated[list[Path] | None, typer.Option(metavar="PATH", help="Compare with it (repeat).")] = None,
    line_to: Annotated[Path | None, typer.Option(metavar="PATH", help="Score merges on the line to it, too.")] = None,
    along: Annotated[str | None, typer.Option(metavar="KEY=A:B", help="Change a number of the recipe.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Merge and score each two of the recipe's models.")] = False,
    points: Annotated[int, typer.Option(min=2, max=200, help="Points of --line-to or --along.")] = 7,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write evaluation.html and .json there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device such as cuda:0.")] = "auto",
    device_map: DeviceMap = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most of a model in memory, with MAP.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that the model runs at once.")] = 32,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps answers between runs.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run Python files that tasks name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Score a model with lm-eval, and tell what it kept of its parents' scores.

    Scores of a result of `mergetool run` are kept beside it, for `mergetool compare`, and stand in its card. With
    --line-to, --along or --pairs, merges are made in memory and scored; nothing else is written.
    """
    from mergetool.engine import Flags
    from mergetool.evaluate.options import TaskOptions
    from mergetool.tuning.placing import device_of

    if device_map is None:
        refuse_idle({"--memory": memory}, "no --device-map")
    flags = Flags(device=device, device_map=device_map, memory=size(memory))
    ready(output)
    names = [name for part in tasks for name in part.split(",") if name]
    chosen = [TaskOptions(name=name, include=include, metric=metric) for name in names]
    how = {"device": device_of(flags), "spread": flags.spread, "batch_size": batch_size, "trust_code": trust_code}
    asked = {"--line-to": line_to, "--along": along, "--pairs": pairs}
    given = [flag for flag, value in asked.items() if value]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} are two questions", "command line", f"leave out {given[1]}")
    if given:
        refuse_idle({"--parent": parent, "--cache": cache}, f"{given[0]}, whose merges are asked in memory")
    if pairs:
        _show(_pairs(_recipe(path, "--pairs"), chosen, how), output, as_json=as_json)
    elif line_to is not None or along is not None:
        _show(_curve(existing(path), line_to, along, points, chosen, how), output, as_json=as_json)
    else:
        folders = [existing(each) for each in parent or ()]
        _show(_scores(existing(path), chosen, folders, cache, how), output, as_json=as_json)


def _scores(
    path: Path, tasks: "Sequence[TaskOptions]", parents: Sequence[Path], cache: Path | None, how: Mapping[str, Any]
) -> Mapping[str, Any]:
    from mergetool.evaluate.assess import assess

    with waiting("scoring"):
        found = assess(path, tasks, parents=parents, cache=cache, **how)
    _keep(path, found)
    return found.facts()


def _curve(
    path: Path, line_to: Path | None, key: str | None, num_points: int, tasks: "Sequence[TaskOptions]", how: Any
) -> Mapping[str, Any]:
    from mergetool.analysis.curve import along, curve, line

    if line_to is not None:
        name, recipes = f"share of {line_to.name}", line(path, existing(line_to), num_points)
    else:
        name, ends = _range(key or "")
        recipes = along(_recipe(path, "--along"), name, ends, num_points)
    with waiting("scoring"):
        return curve(name, recipes, tasks, say=say, **how).as_dict()


def _recipe(path: Path, flag: str) -> Path:
    """A recipe's file. Raises RecipeError for a folder."""
    if existing(path).is_dir():
        what = f"is a folder, and {flag} is about a recipe"
        raise RecipeError(what, str(path), f"name the recipe's file: mergetool evaluate recipe.yaml {flag} ...")
    return path


def _range(text: str) -> tuple[str, tuple[float, float]]:
    """A key, and the numbers it runs between."""
    key, _, ends = text.partition("=")
    try:
        start, stop = map(float, ends.split(":"))
    except ValueError:
        what = f"{text!r} is not a key and the numbers that it runs between"
        raise RecipeError(what, "--along", "write e.g. --along merge.scale=0:2") from None
    if start == stop:
        raise RecipeError(f"both ends are {start}", "--along", f"write e.g. --along {key}=0:2")
    return key, (start, stop)


def _pairs(path: Path, tasks: "Sequence[TaskOptions]", how: Mapping[str, Any]) -> Mapping[str, Any]:
    from mergetool.analysis.interference import interference
    from mergetool.recipe import load_recipe

    with waiting("scoring"):
        return interference(load_recipe(path), tasks, say=say, **how).as_dict()


def _show(facts: Mapping[str, Any], output: Path | None, *, as_json: bool) -> None:
    """Whatever was asked, as a page, as data, or as tables."""
    if output is not None:
        _write(facts, output)
    if as_json:
        print_answer(facts, as_json=True)
    elif "pairs" in facts:
        _table(_OF_PAIRS, facts["pairs"])
    elif "points" in facts:
        _table(_OF_POINTS, facts["points"])
        print()
        _table(_OF_BARRIERS, facts["barriers"])
    else:
        _table((*_HEADS, *(_OF_PARENTS if facts["parents"] else ())), facts["tasks"])
        if told := facts.get("retention"):
            say("kept of the best parent: {mean:.4f} (geometric {geometric:.4f}, worst {worst:.4f})".format_map(told))


def _write(facts: Mapping[str, Any], folder: Path) -> None:
    import json

    from mergetool.analysis.written import write_both

    data = json.dumps(facts, indent=2, ensure_ascii=False)
    page = write_both(folder, "evaluation", data, lambda: _page_of(facts)(facts))
    say(f"written: {page}, and evaluation.json")


def _page_of(facts: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    from mergetool.analysis.evaluation_page import page_of_curve, page_of_pairs, page_of_scores

    return page_of_pairs if "pairs" in facts else page_of_curve if "points" in facts else page_of_scores


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    table(
        [column if column in _OF_PARENTS else column.replace("_", " ") for column in columns],
        [["-" if row.get(column) is None else row[column] for column in columns] for row in rows],
    )


def _keep(path: Path, found: "Evaluation") -> None:
    """Scores of a result of ours are kept, and told in its card."""
    from mergetool.outputs.scored import tell_scores
    from mergetool.outputs.scores import keep_scores, kept_scores
    from mergetool.outputs.staging import LOCK_NAME

    if not (path / LOCK_NAME).is_file():
        return
    try:
        say(f"kept for mergetool compare: {keep_scores(path, found)}")
        if not tell_scores(path, kept_scores(path) or found):
            say("note: README.md is not what the run has written, and was left as it is")
    except (OutputError, SourceError) as error:  # the scores are there all the same
        say(f"warning: the scores are not kept: {error}")
