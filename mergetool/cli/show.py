"""How things look: errors, messages, tables. Colour only on a terminal, and none where NO_COLOR is set."""

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from mergetool.errors import MergetoolError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Manner:
    """How much is said."""

    quiet: bool = False
    verbose: bool = False
    warnings: int = 0
    """How many have been said."""


manner = Manner()
_MOST_WARNINGS = 10


def console(stream: TextIO | None = None) -> "Console":
    """Where people read; rich is imported when the first one does."""
    from rich.console import Console

    return Console(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)


def say(text: str, where: "Console | None" = None, stream: TextIO | None = None) -> None:
    """A line for people. Of many warnings the first ones; -v says all of them."""
    if manner.quiet:
        return
    kind, colon, rest = text.partition(": ")
    if colon and kind == "warning":
        manner.warnings += 1
        if manner.warnings > _MOST_WARNINGS and not manner.verbose:
            return
    if kind in _STYLES and colon:
        _say(kind, _STYLES[kind], f": {rest}", where, stream)
    else:
        _say("", "", text, where, stream)


_STYLES = {"warning": "bold yellow", "note": "bold"}


def say_of_more() -> None:
    """How many warnings were kept back."""
    if manner.warnings > _MOST_WARNINGS and not manner.verbose:
        say(f"{manner.warnings - _MOST_WARNINGS} more warnings: -v says them all")


def is_terminal(stream: TextIO) -> bool:
    """Whether people see colours and bars there."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _say(head: str, style: str, rest: str, where: "Console | None" = None, stream: TextIO | None = None) -> None:
    stream = stream or sys.stderr
    if where is None and not is_terminal(stream):  # without what rich costs to import
        print(f"{head}{plain(rest)}", file=stream, flush=True)
        return
    from rich.text import Text

    (where or console(stream)).print(Text.assemble((head, style), plain(rest)), soft_wrap=True)


def show_warnings_plainly() -> None:
    """What our code warns of looks like everything else for people; other packages' warnings stay as they are."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.startswith("mergetool."):
            say(f"warning: {message}")
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def plain(text: str) -> str:
    """Text in which names out of a hostile file can do nothing to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def explain(error: MergetoolError, *, as_json: bool) -> None:
    """Print an error: on stderr for people, and with `as_json` on stdout too."""
    problems = error.problems if isinstance(error, RecipeError) else (error,)
    for problem in problems:
        _say("error", "bold red", f": {problem}")
    if as_json:
        _print_json(error.as_dict())


def explain_usage(error: Any, *, as_json: bool) -> None:
    """Print what the command-line library says about a wrong option or argument."""
    error.show()
    if as_json:
        _print_json(RecipeError(error.format_message(), "command line", "see: mergetool --help").as_dict())


def explain_bug(*, as_json: bool) -> None:
    """Print the traceback of an error that should not have been possible."""
    text = traceback.format_exc()
    _say("", "", text)
    _say("", "", "this is a bug in mergetool: please report it, with the lines above")
    if as_json:
        _print_json({"error": "Bug", "exit_code": 1, "what": text, "where": "", "fix": "please report it"})


def interrupted(arguments: Sequence[str], code: int, *, as_json: bool) -> None:
    """Say what Ctrl-C or SIGTERM left behind, and how to go on."""
    again = shlex.join(["mergetool", *(word for word in arguments if word != "--no-resume")])
    what, fix = "interrupted", f"run it again: {again}"
    if "run" in arguments:
        what, fix = "interrupted; what was finished is kept", f"this goes on from there: {again}"
    _say(what, "bold", f"\n  fix: {fix}")
    if as_json:
        _print_json({"error": "Interrupted", "exit_code": code, "what": what, "where": "", "fix": fix})


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns on stdout; heads are left out when they are all empty."""
    cells = [[plain(_cell(value)) for value in row] for row in rows]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _rich_table(heads, cells)
        return
    lines = ([list(heads)] if any(heads) else []) + cells
    widths = [max((len(line[at]) for line in lines), default=0) for at in range(len(heads))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _rich_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """The same for a terminal: bold heads, and cells that are folded where it is too narrow."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=any(heads), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        made.add_column(head, overflow="fold", no_wrap=place == 0)  # names are to be copied
    for line in cells:
        made.add_row(*map(Text, line))
    console(sys.stdout).print(made)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def show_found(found: Sequence[Mapping[str, str]]) -> None:
    """What is known by a word, what to write for it, and a recipe that shows it."""
    table(("known as", "here", "recipe"), [(f["name"], f["write"], f["recipe"]) for f in found])


def show_methods(facts: Sequence[Mapping[str, Any]], *, in_full: bool) -> None:
    """The list of methods, or everything about one."""
    if not in_full:
        table(("method", "base", "what it does"), [(f["name"], f["base"], f["summary"]) for f in facts])
        return
    for fact in facts:
        print(f"{fact['name']}\n{'=' * len(fact['name'])}\n\n{fact['documentation']}\n")
        table(
            ("field", "type", "default", "meaning"),
            [(f["name"], f["type"], f["default"], f["help"]) for f in fact["fields"]],
        )
