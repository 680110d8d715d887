"""What all commands have in common: -h, -q and -v, and an example in the help."""

import inspect
import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mergetool.cli.show import manner
from mergetool.errors import RecipeError, SourceError

Command = TypeVar("Command", bound=Callable[..., None])

Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but the result and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more: every step, every warning and note.")]
DeviceMap = Annotated[
    str | None, typer.Option(metavar="MAP", help="Deal networks over devices, memory and the disk: auto.")
]


def set_manner(*, quiet: bool = False, verbose: bool = False) -> None:
    """What the program is told before the command's name."""
    manner.quiet, manner.verbose, manner.warnings = quiet, verbose, 0


def command(app: typer.Typer, example: str, name: str | None = None) -> Callable[[Command], Command]:
    """Register a function as a command; `example` is a line that can be typed."""

    def register(function: Command) -> Command:
        app.command(name, epilog=f"Example: {example}")(_with_manners(function))
        return function

    return register


def _with_manners(function: Callable[..., None]) -> Callable[..., None]:
    """The same function with the options that every command has."""

    @wraps(function)
    def called(*, quiet: bool, verbose: bool, **arguments: Any) -> None:
        manner.quiet |= quiet
        manner.verbose |= verbose
        function(**arguments)

    more = {"quiet": Quiet, "verbose": Verbose}
    own = inspect.signature(function)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in more.items()
    ]
    called.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    called.__annotations__ = {**function.__annotations__, **more}
    return called


def is_follower() -> bool:
    """Whether a launcher has started this process beside one that speaks for all; told without importing torch."""
    return "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") not in ("", "0")


def existing(path: Path) -> Path:
    """A folder that a command is given. Raises SourceError where there is none, before anything slow is done."""
    if not path.exists():
        raise SourceError("there is no such folder", str(path.absolute()), "check the path")
    return path


def ready(output: Path | None) -> None:
    """Make the folder for a page before anything slow is done. Raises OutputError."""
    from mergetool.tensors.writer import make_folder

    if output is not None:
        make_folder(output)


def named(where: str, given: Iterable[str], shape: str, example: str) -> dict[str, str]:
    """What NAME=VALUE says, several times; `shape` is what it is called. Raises RecipeError."""
    pairs = {text: text.partition("=") for text in given}
    for text, (name, _, value) in pairs.items():
        if not (name and value):
            raise RecipeError(f"{text!r} is not {shape}", where, f"write e.g. {example}")
    return {name: value for name, _, value in pairs.values()}


def method_names(incomplete: str) -> list[str]:
    """Methods whose names begin so, for a shell that completes them."""
    from mergetool.methods import registry

    return [name for name in registry() if name.startswith(incomplete)]


def size(text: str | None) -> int | None:
    """A size in words, in bytes. Raises RecipeError."""
    from mergetool.recipe.schema import parse_size

    if text is None:
        return None
    try:
        return parse_size(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise RecipeError(str(error), "--memory", "write e.g. --memory 8GiB") from None
