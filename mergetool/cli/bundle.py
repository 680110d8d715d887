"""The commands about bundles: their answers, what is in one, and one expert more or less."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli.against import refuse_idle
from mergetool.cli.answers import print_answer, say_alike, say_result
from mergetool.cli.commands import command, existing, named, ready
from mergetool.cli.progress import ProgressBar, waiting
from mergetool.cli.quick import prepare_torch
from mergetool.cli.show import manner, say, table
from mergetool.errors import PlanError
from mergetool.units import filesize

if TYPE_CHECKING:
    from mergetool.bundle.marks import Marks
    from mergetool.bundle.mass_model import MassModel
    from mergetool.bundle.rows import Row

app = typer.Typer(help="List the experts of a bundle, add and remove some, or take one out.", no_args_is_help=True)

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by mass, smile, twin, emr ...")]
Elsewhere = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write a new bundle there, and leave this one as it is.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Workers (default: one per core).")]
Device = Annotated[str, typer.Option(help="auto, cpu, or a torch device such as cuda:0.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def calibrate(
    bundle: Bundle,
    rows: Annotated[Path, typer.Option("--input", metavar="FILE", help="JSON Lines as for route, each with its task.")],
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Correct a bundle's router with a few rows whose tasks are known."""
    from mergetool.bundle.calibrate import calibrate as fit
    from mergetool.bundle.calibration import CALIBRATION_NAME
    from mergetool.bundle.opening import load_bundle
    from mergetool.bundle.rows import read_rows
    from mergetool.engine.devices import device_for_networks

    given = read_rows(rows)
    with waiting("calibrating"):
        model = load_bundle(existing(bundle)).to(device_for_networks(device))
        before = _marked(model, given)
        calibration = fit(model, given)
        after = _marked(model, given)
    for name, found in (("before", before), ("now", after)):
        say(f"{name}: the right task answers {found.figures[-1]['right']:.1%} of these rows")
    told = {**calibration.model_dump(), "before": before.as_dict(), "after": after.as_dict()}
    print_answer(told if as_json else bundle / CALIBRATION_NAME, as_json=as_json)


def route(
    bundle: Bundle,
    rows: Annotated[Path, typer.Option("--input", metavar="FILE", help='JSON Lines: {"text": ...} or model inputs.')],
    task: Annotated[list[str] | None, typer.Option(help="Force this task (repeat for several).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are answered together.")] = 32,
    device: Device = "auto",
    labels: Annotated[
        bool,
        typer.Option(
            "--labels", help="Mark the answers by each row's `task` and `label`, and print how many are right."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="With --labels: marks.html and .json there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer rows with a bundle: which tasks they belong to, and what the right head says."""
    from mergetool.bundle.opening import load_bundle
    from mergetool.bundle.rows import answers, read_rows
    from mergetool.engine.devices import device_for_networks

    if labels:
        refuse_idle({"--task": task}, "--labels, which asks whether the task is found")
    elif output is not None:
        raise PlanError("the page is about marks, and no answer is marked", "-o", "mark the answers: --labels")
    ready(output)
    given = read_rows(rows)
    model = load_bundle(existing(bundle)).to(device_for_networks(device))
    if labels:
        _mark(model, given, batch_size, output, as_json=as_json)
        return
    answered = answers(model, given, tasks=task, batch_size=batch_size)
    if as_json:
        for answer in answered:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        return
    heads = ("task", "label", "probability", "known", "task_probability", "runner_up", "tasks", "coefficients")
    shown = [
        {**answer, "task": answer["task"] or "-", "known": "yes" if answer["known"] else "no"} for answer in answered
    ]
    table(
        [head.replace("_", " ") for head in heads], [[_or_dash(answer.get(key)) for key in heads] for answer in shown]
    )


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value


def _mark(model: "MassModel", rows: "Sequence[Row]", batch_size: int, output: Path | None, *, as_json: bool) -> None:
    from mergetool.bundle.marks import marks

    answered = _answered(model, rows, batch_size)
    found = marks(model.task_names, rows, answered)
    if output is not None:
        from mergetool.analysis.marks_page import write_marks

        say(f"written: {write_marks(found, rows, answered, output)}, and marks.json")
    _show_marks(found, as_json=as_json)


def _marked(model: "MassModel", rows: "Sequence[Row]") -> "Marks":
    from mergetool.bundle.marks import marks

    return marks(model.task_names, rows, _answered(model, rows))


def _answered(model: "MassModel", rows: "Sequence[Row]", batch_size: int = 32) -> list[dict[str, Any]]:
    """Answers to rows that each name one of the bundle's tasks."""
    from mergetool.bundle.marks import check_tasks_of
    from mergetool.bundle.rows import answers

    check_tasks_of(rows, model.task_names)
    return list(answers(model, rows, batch_size=batch_size))


def _show_marks(found: "Marks", *, as_json: bool) -> None:
    """How often the right task answers, and with the right class; then who answered rows of which task."""
    if as_json:
        print_answer(found.as_dict(), as_json=True)
        return
    keys = ("right", "right_low", "right_high", "strict", "strict_low", "strict_high")
    heads = ("task", "rows", "task right", "low", "high", "class too", "low", "high")
    table(heads, [[each["task"], each["rows"], *(_share(each[key]) for key in keys)] for each in found.figures])
    print("\nrows of each task (down) by the task that answered (across)")
    refused = [[count] for count in found.refused] or [[] for _ in found.tasks]
    counts = zip(found.tasks, found.confusion, refused, strict=True)
    head = ("", *found.tasks, *(("refused",) if found.refused else ()))
    table(head, [[task, *answered, *left] for task, answered, left in counts])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


@command(app, "mergetool bundle list bundle", "list")
def list_experts(bundle: Bundle, as_json: AsJson = False) -> None:
    """List the experts of a bundle: what each is and costs, and which of them cannot be told apart."""
    from mergetool.bundle.verify import facts_about_bundle

    facts = facts_about_bundle(existing(bundle))
    tasks = facts["tasks"]
    if as_json:
        print_answer(tasks, as_json=True)
    else:
        columns = ("name", "source", "bytes", "rank", "head", "head_bytes", "classes")
        sized = [task | {key: filesize(task[key]) for key in ("bytes", "head_bytes") if task[key]} for task in tasks]
        heads = ("expert", "source", "factors", "rank", "head", "size of head", "classes")
        table(heads, [[task[column] or "-" for column in columns] for task in sized])
    say_alike(bundle, facts)


@command(app, "mergetool bundle add bundle reviews=models/reviews")
def add(
    bundle: Bundle,
    experts: Annotated[list[str], typer.Argument(metavar="NAME=SOURCE...", help="Folders or Hub ids of experts.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="SOURCE is an adapter on the bundle's base.")] = False,
    output: Elsewhere = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Add experts to a bundle. What it keeps of the others is cut to make room, never computed anew."""
    sources = named("mergetool bundle add", experts, "NAME=SOURCE", "reviews=models/reviews")
    models = {name: {"adapter": source} if adapter else source for name, source in sources.items()}
    _change(bundle, models, [], output, workers, as_json=as_json)


@command(app, "mergetool bundle remove bundle reviews")
def remove(
    bundle: Bundle,
    experts: Annotated[list[str], typer.Argument(metavar="NAME...", help="Experts of the bundle.")],
    output: Elsewhere = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Remove experts from a bundle. The others stay as they are."""
    _change(bundle, {}, experts, output, workers, as_json=as_json)


@command(app, "mergetool bundle dense bundle reviews -o reviews")
def dense(
    bundle: Bundle,
    expert: Annotated[str, typer.Argument(metavar="NAME", help="An expert of the bundle.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the checkpoint goes.")],
    as_json: AsJson = False,
) -> None:
    """Write one expert as a plain checkpoint, with its head and labels."""
    prepare_torch(whole=False)
    with ProgressBar(quiet=manner.quiet) as progress:
        from mergetool.engine.growing import dense_recipe
        from mergetool.engine.run import Flags, run_recipe

        result = run_recipe(dense_recipe(existing(bundle), expert), Flags(output), progress)
    say_result(result)
    print_answer(result.as_dict() if as_json else result.path, as_json=as_json)


def _change(
    bundle: Path, add: dict[str, Any], remove: list[str], output: Path | None, workers: int | None, *, as_json: bool
) -> None:
    prepare_torch(whole=False)
    with ProgressBar(quiet=manner.quiet) as progress:
        from mergetool.engine.growing import change_bundle
        from mergetool.engine.run import Flags

        flags = Flags(output, workers=workers, fork=sys.platform == "linux")
        result = change_bundle(bundle, add, remove, flags, progress)
    if result is None:
        say("done already: only saying so was missing")
    else:
        say_result(result)
    path = output or bundle
    print_answer((result.as_dict() if result else {"path": str(path)}) if as_json else path, as_json=as_json)
