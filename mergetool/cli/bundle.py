"""The commands about bundles: what is in one, and one expert more or less."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mergetool.cli.answers import print_answer, say_result
from mergetool.cli.commands import command, existing
from mergetool.cli.progress import ProgressBar
from mergetool.cli.show import manner, say, table
from mergetool.errors import RecipeError
from mergetool.units import filesize

app = typer.Typer(help="List the experts of a bundle, add and remove some, or take one out.", no_args_is_help=True)

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by the method mass or tsv-compress.")]
Elsewhere = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write a new bundle there, and leave this one as it is.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Workers (default: one per core).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@command(app, "mergetool bundle list bundle", "list")
def list_experts(bundle: Bundle, as_json: AsJson = False) -> None:
    """List the experts of a bundle."""
    from mergetool.bundle.verify import facts_about_bundle

    tasks = facts_about_bundle(existing(bundle))["tasks"]
    if as_json:
        print_answer(tasks, as_json=True)
        return
    rows = [[task["name"], task["source"], filesize(task["bytes"]), task["classes"], task["head"]] for task in tasks]
    table(["expert", "source", "factors", "classes", "head"], [[cell or "-" for cell in row] for row in rows])


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
    named = dict(_named(text) for text in experts)
    models = {name: {"adapter": source} if adapter else source for name, source in named.items()}
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
    with ProgressBar(quiet=manner.quiet) as progress:
        from mergetool.engine.growing import dense_recipe
        from mergetool.engine.run import Flags, run_recipe

        result = run_recipe(dense_recipe(existing(bundle), expert), Flags(output), progress)
    say_result(result)
    print_answer(result.as_dict() if as_json else result.path, as_json=as_json)


def _named(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not (name and source):
        raise RecipeError(f"{text!r} is not NAME=SOURCE", "mergetool bundle add", "write e.g. reviews=models/reviews")
    return name, source


def _change(
    bundle: Path, add: dict[str, Any], remove: list[str], output: Path | None, workers: int | None, *, as_json: bool
) -> None:
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
