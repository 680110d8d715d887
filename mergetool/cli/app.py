"""The commands. Each is a thin line from flags to a function of the floors below, and prints what it returns.

stdout carries the result (a path, a table, or JSON with --json); stderr carries everything for people.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergetool._version import __version__
from mergetool.cli import bundle as bundles
from mergetool.cli.against import hold_against, refuse_idle
from mergetool.cli.analyze import analyze
from mergetool.cli.answers import deliver, inspect_bundle, print_answer, say_pushed, say_result, say_steps
from mergetool.cli.commands import (
    DeviceMap,
    Quiet,
    Verbose,
    command,
    existing,
    is_follower,
    method_names,
    set_manner,
    size,
)
from mergetool.cli.compare import compare
from mergetool.cli.diff import diff
from mergetool.cli.evaluate import evaluate
from mergetool.cli.progress import ProgressBar, waiting
from mergetool.cli.quick import prepare_torch
from mergetool.cli.show import manner, say, say_of_more, show_found, show_methods, table

if TYPE_CHECKING:
    from mergetool.methods.base import Stats
    from mergetool.planning import Plan
    from mergetool.planning.cost import Costs

app = typer.Typer(
    name="mergetool",
    help="Merge neural networks in weight space.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Override one value, e.g. merge.density=0.3.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mergetool {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    set_manner(quiet=quiet, verbose=verbose)


@command(app, "mergetool run recipe.yaml -o merged --set merge.density=0.3")
def run(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of output.path.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device such as cuda:0.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Workers (default: one per core).")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most memory to use, e.g. 8GiB.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at the output.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over instead of resuming.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps factors, statistics or answers between runs.")
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run Python files that the recipe names.")] = False,
    push: Annotated[
        bool | None, typer.Option("--push/--no-push", help="Push to output.hub (default: if given).")
    ] = None,
    locked: Annotated[bool, typer.Option("--locked", help="Refuse inputs that differ from mergetool.json.")] = False,
    device_map: DeviceMap = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Merge models as a recipe says. Resumes by itself after a kill."""
    from mergetool.recipe import load_recipe

    manner.quiet |= is_follower()
    prepare_torch(whole=trust_code)
    with ProgressBar(quiet=manner.quiet) as progress:
        asked = load_recipe(recipe, settings or ())
        say_steps(asked, progress)
        from mergetool.engine import Flags  # torch comes with it: not before the first word
        from mergetool.tuning.run import run_recipe

        flags = Flags(
            output,
            device,
            workers,
            size(memory),
            overwrite=overwrite,
            resume=not no_resume,
            cache=cache,
            fork=sys.platform == "linux",
            trust_code=trust_code,
            push=push,
            locked=locked,
            device_map=device_map,
        )
        result = run_recipe(asked, flags, progress)
    if not is_follower():
        say_result(result)
        print_answer(result.as_dict() if as_json else result.path, as_json=as_json)


@command(app, "mergetool validate recipe.yaml --online")
def validate(
    recipe: RecipeFile,
    online: Annotated[
        bool, typer.Option("--online", help="Look at the models' headers too, on the Hub as well.")
    ] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe without opening any model: keys, names, types, ranges."""
    from mergetool.recipe import load_recipe

    checked = load_recipe(recipe, settings or ())
    warnings = checked.all_warnings
    if online:
        from mergetool.planning import make_plan

        warnings = make_plan(checked).warnings
    for warning in warnings:
        say(f"warning: {warning}")
    method, models = checked.method.method_name(), list(checked.models)
    answer = {"valid": True, "method": method, "models": models, "warnings": list(warnings)}
    print_answer(answer if as_json else f"{recipe}: valid", as_json=as_json)


@command(app, "mergetool plan recipe.yaml --memory 8GiB")
def plan(
    recipe: RecipeFile,
    settings: Settings = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads to plan for.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory to plan for, e.g. 8GiB.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every tensor in a row of its own.")] = False,
    count: Annotated[
        bool, typer.Option("--count", help="Count what a run counts first (scale: recover), which reads weights.")
    ] = False,
    machines: Annotated[bool, typer.Option("--machines", help="Expected times on other machines, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do, from headers alone: amounts, memory and time, then what becomes of the tensors."""
    from mergetool.engine.choice import settled
    from mergetool.planning import make_plan
    from mergetool.planning.report import HEADS, describe, tables, totals
    from mergetool.recipe import load_recipe

    asked = load_recipe(recipe, settings or ())
    search = asked.method if asked.method.searches else None
    made = make_plan(asked)
    costs = settled(made, "auto", workers=workers, memory=size(memory))
    for warning in made.warnings:
        say(f"warning: {warning}")
    say_of_more()
    counted = _counted(made, costs) if count else {}
    if as_json:
        print_answer(describe(made, costs, search) | ({"counted": counted} if count else {}), as_json=True)
        return
    found = [("counted", f"{name} {', '.join(f'{value:.4g}' for value in each)}") for name, each in counted.items()]
    table(("", ""), [*totals(made, costs, machines=machines, search=search), *found])
    for title, rows in tables(made, full=full or manner.verbose):
        print(f"\n{title}" if title else "")
        table(HEADS, rows)


def _counted(made: "Plan", costs: "Costs") -> "Stats":
    from mergetool.engine.dry import dry_count

    with ProgressBar(quiet=manner.quiet) as progress:
        return dry_count(made, costs, progress)


@command(app, "mergetool inspect org/model@main")
def inspect(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="A folder, a .safetensors file, or org/name@revision.")
    ],
    as_json: AsJson = False,
) -> None:
    """Look at a checkpoint's headers: tensors, dtypes, shards, tied weights, health."""
    from mergetool.bundle import is_bundle
    from mergetool.planning.inspect import facts_about

    if is_bundle(Path(reference)):
        inspect_bundle(Path(reference), as_json=as_json)
        return
    facts = facts_about(reference)
    if as_json:
        print_answer(facts, as_json=True)
        return
    tensors = facts.pop("tensors")
    table(("tensor", "dtype", "shape", "bytes"), [(t["name"], t["dtype"], t["shape"], t["bytes"]) for t in tensors])
    table(("", ""), list(facts.items()))


@command(app, "mergetool dequantise ./hqq-model -o plain")
def dequantise(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A quantised model that transformers opens.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="Where to write plain weights.")],
) -> None:
    """Write a quantised model as plain weights, by the library that quantised it: for codes that no merge can read."""
    from mergetool.networks.dequantise import dequantise as write

    with waiting("dequantising"):
        print_answer(str(write(path, output)), as_json=False)


@command(app, "mergetool verify merged --against recipe.yaml")
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A merged checkpoint (or any model).")],
    load: Annotated[bool, typer.Option("--load", help="Open it with transformers, too, and run one step.")] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="Is it what this recipe says, tensor by tensor?")
    ] = None,
    settings: Settings = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Workers for --against.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most memory for --against.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run Python files that the recipe names.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a result against its lock and its config.json, and scan its weights for values that are not finite.

    With --against: is it what a recipe says, to the rounding of its dtype? Exit 0: yes; 3: no; 5: cannot tell.
    """
    from mergetool.bundle import is_bundle

    asked = {"--set": settings, "--workers": workers, "--memory": memory, "--trust-code": trust_code}
    if against is not None:
        refuse_idle({"--load": load}, "--against, which reads weights only")
        hold_against(path, against, settings or (), workers, size(memory), trust_code=trust_code, as_json=as_json)
        return
    refuse_idle(asked, "no --against RECIPE")
    if is_bundle(path):
        from mergetool.bundle.verify import verify_bundle

        report = verify_bundle(path)
        if load:
            from mergetool.bundle.opening import load_bundle

            load_bundle(path, verify=False)
            report["summary"] += "; opens as a bundle"
    else:
        from mergetool.outputs.verify import verify_output

        with waiting("verifying"):
            report = verify_output(path, load=load)
    print_answer(report if as_json else f"{path}: {report['summary']}", as_json=as_json)


app.add_typer(bundles.app, name="bundle")
command(app, "mergetool analyze recipe.yaml -o report")(analyze)
command(app, "mergetool diff base merged --top 10")(diff)
command(app, "mergetool compare merged1 merged2 --base base")(compare)


@command(app, "mergetool push merged org/merged --private")
def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A finished result.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it as a private repository.")] = False,
    create: Annotated[bool, typer.Option("--create", help="Make the repository if there is none.")] = False,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a result to the Hub: what changed since the last push, in one commit."""
    from mergetool.outputs.push import push as push_folder
    from mergetool.tensors.hub_upload import Target

    with waiting("pushing"):
        pushed = push_folder(existing(path), Target(repo, private, create, pull_request))
    say_pushed(pushed)
    print_answer(pushed.as_dict() if as_json else pushed.url, as_json=as_json)


command(app, "mergetool calibrate bundle --input rows.jsonl")(bundles.calibrate)
command(app, "mergetool route bundle --input rows.jsonl --task maths")(bundles.route)
command(app, "mergetool evaluate merged --tasks arc_easy,piqa --parent models/math")(evaluate)


@command(app, "mergetool methods ties")
def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A method, for its full documentation.", autocompletion=method_names),
    ] = None,
    word: Annotated[
        str | None, typer.Option("--find", metavar="WORD", help="What papers call it, such as chat-vector or SWA.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the merging methods, explain one, or find what is known by another name."""
    from mergetool.recipe.documentation import method_facts

    if word is not None:
        from mergetool.recipe.known_as import find

        print_answer(find(word), as_json=True) if as_json else show_found(find(word))
        return
    facts = method_facts(name)
    if as_json:
        print_answer(facts, as_json=True)
    else:
        show_methods(facts, in_full=name is not None)


@command(app, "mergetool init ties -o recipe.yaml")
def init(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="See: mergetool methods.", autocompletion=method_names)
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of stdout.")] = None,
) -> None:
    """Write a recipe to begin with: all that a method can be told, with defaults and meanings."""
    from mergetool.recipe.starter import starter

    deliver(starter(method), output)


@command(app, "mergetool schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of recipes, for editors and other tools."""
    from mergetool.recipe.json_schema import recipe_schema

    print_answer(recipe_schema(), as_json=True)


@command(app, "mergetool import mergekit.yaml -o recipe.yaml", "import")
def import_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="MERGEKIT_YAML", help="A mergekit recipe.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of stdout.")] = None,
) -> None:
    """Convert a mergekit recipe to one of ours (`run` takes it as it is, too)."""
    from mergetool.recipe.load import imported_text

    text, warnings = imported_text(recipe, output.parent if output else Path())
    for warning in warnings:
        say(f"warning: {warning}")
    deliver(text, output)
