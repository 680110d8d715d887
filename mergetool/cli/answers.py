"""What commands answer with, and what they say beside it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.cli.show import manner, say, say_of_more, table
from mergetool.errors import OutputError
from mergetool.units import filesize, timespan

if TYPE_CHECKING:
    from mergetool.cli.progress import ProgressBar
    from mergetool.outputs.result import Result
    from mergetool.recipe import Recipe
    from mergetool.tensors.hub_upload import Pushed


def print_answer(answer: Any, *, as_json: bool) -> None:
    """The result of a command, on stdout."""
    print(json.dumps(answer, indent=2, ensure_ascii=False, default=str) if as_json else answer)


def deliver(text: str, output: Path | None) -> None:
    """A recipe on stdout, or in a new file."""
    from mergetool.tensors.writer import write_file

    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise OutputError("exists already", str(output), "remove it, or choose another name: -o OTHER.yaml")
    write_file(output, text)
    print(output)


def say_steps(recipe: "Recipe", progress: "ProgressBar") -> None:
    """What a run will do, before it begins; with -v, every step."""
    after = "".join(f", then {step.step_name()}" for step in recipe.then)
    progress.say(f"{recipe.method.method_name()}{after} of {', '.join(recipe.models)}")
    if not manner.verbose:
        return
    from mergetool.planning import make_plan
    from mergetool.planning.report import tables

    rows = [row for _, rows in tables(make_plan(recipe), full=True) for row in rows]
    for name, _, shape, dtype, how, sources, parameters in rows:
        say(f"step: {name} {shape} {dtype}: {how} of {sources}{f' ({parameters})' if parameters else ''}")


def say_result(result: "Result") -> None:
    """What is worth knowing of a finished run."""
    say_of_more()
    for note, count in result.notes.items():
        say(f"note: {note} ({count} tensors)" if count > 1 else f"note: {note}")
    for each in result.results:
        say(f"result: {each}")
    say(f"{result.num_tensors} tensors, {filesize(result.bytes_written)} in {timespan(result.seconds)}")
    if result.pushed is not None:
        say_pushed(result.pushed)


def say_pushed(pushed: "Pushed") -> None:
    """What became of the files that were to be uploaded."""
    done = f"{len(pushed.uploaded)} files uploaded, {pushed.unchanged} unchanged"
    say(f"{pushed.repo}: {done}{f', {len(pushed.deleted)} deleted' if pushed.deleted else ''}")


def inspect_bundle(folder: Path, *, as_json: bool) -> None:
    """What a bundle holds: interference by matrix, tasks, sizes."""
    from mergetool.bundle.verify import facts_about_bundle

    facts = facts_about_bundle(folder)
    if as_json:
        print_answer(facts, as_json=True)
        return
    tasks, interference = facts.pop("tasks"), facts.pop("interference")
    table(("matrix", "interference (0: none)"), sorted(interference.items(), key=lambda item: -item[1]))
    columns = ("name", "rank", "directions", "bytes", "head_bytes", "head", "classes", "pool", "source")
    heads = [column.replace("_", " ") for column in columns[1:]]
    table(("task", *heads), [["-" if task[key] is None else task[key] for key in columns] for task in tasks])
    table(("", ""), [(key, value) for key, value in facts.items() if key != "alike"])
    say_alike(folder, facts)


def say_alike(folder: Path, facts: Mapping[str, Any]) -> None:
    """Which experts of a bundle cannot be told apart, and what to do about it."""
    from mergetool.bundle.alike import Alike
    from mergetool.bundle.manifest import AROUND, MASKED

    for each in facts["alike"]:
        pair = Alike(**each)
        command = shlex.join(["mergetool", "bundle", "remove", str(folder), pair.other])
        again = facts["kind"] in (*MASKED, *AROUND)
        say(f"note: {pair}; leave one out: {'run its recipe again without it' if again else command}")
