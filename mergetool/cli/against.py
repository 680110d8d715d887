"""`mergetool verify PATH --against RECIPE`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from mergetool.cli.answers import print_answer
from mergetool.cli.progress import ProgressBar
from mergetool.cli.show import explain, manner, say
from mergetool.errors import PlanError


def refuse_idle(options: Mapping[str, Any], beside: str) -> None:
    """Raise PlanError for an option that was given and would have no effect."""
    for name, value in options.items():
        if value:
            raise PlanError(f"there is {beside}, so this would have no effect", name, "leave it out")


def hold_against(
    path: Path,
    recipe: Path,
    settings: Sequence[str],
    workers: int | None,
    memory: int | None,
    *,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Print the answer, or end with the code that says it."""
    from mergetool.recipe import load_recipe

    with ProgressBar(quiet=manner.quiet) as progress:
        asked = load_recipe(recipe, settings)
        from mergetool.engine.against import verify_against
        from mergetool.engine.run import Flags

        flags = Flags(workers=workers, memory=memory, trust_code=trust_code)
        agreement = verify_against(path, asked, flags, progress)
    for remark in agreement.remarks:
        say(f"note: {remark}")
    if agreement.error is None or as_json:
        print_answer(agreement.as_dict() if as_json else f"{path}: yes: {agreement.reason}", as_json=as_json)
    if agreement.error is not None:
        explain(agreement.error, as_json=False)
        raise typer.Exit(agreement.error.exit_code)
