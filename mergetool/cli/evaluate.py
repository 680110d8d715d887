"""`mergetool evaluate PATH`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergetool.cli.against import refuse_idle
from mergetool.cli.answers import print_answer
from mergetool.cli.commands import existing, size
from mergetool.cli.progress import waiting
from mergetool.cli.show import say, table

if TYPE_CHECKING:
    from mergetool.evaluate.scores import Evaluation

_HEADS = ("task", "metric", "items", "score", "low", "high")
_OF_PARENTS = ("best_parent", "retention", "difference_low", "difference_high")


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A model folder with its tokenizer.")],
    tasks: Annotated[list[str], typer.Option(metavar="NAME", help="A task of lm-eval (repeat, or a,b,c).")],
    include: Annotated[str | None, typer.Option(metavar="FOLDER", help="Tasks of your own: YAML files.")] = None,
    metric: Annotated[str | None, typer.Option(help="Which metric counts (default: the task's first).")] = None,
    parent: Annotated[list[Path] | None, typer.Option(metavar="PATH", help="Compare with it (repeat).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device such as cuda:0.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(metavar="MAP", help="Deal networks over devices, memory and the disk: auto.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most of a model in memory, with MAP.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that the model runs at once.")] = 32,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps answers between runs.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run Python files that tasks name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Score a model with lm-eval, and tell what it kept of its parents' scores.

    Scores of a result of `mergetool run` are kept beside it, for `mergetool compare`, and stand in its card.
    """
    from mergetool.engine import Flags
    from mergetool.evaluate.assess import assess
    from mergetool.evaluate.options import TaskOptions
    from mergetool.tuning.placing import device_of, spread_of

    if device_map is None:
        refuse_idle({"--memory": memory}, "no --device-map")
    flags = Flags(device=device, device_map=device_map, memory=size(memory))
    names = [name for part in tasks for name in part.split(",") if name]
    chosen = [TaskOptions(name=name, include=include, metric=metric) for name in names]
    with waiting("scoring"):
        found = assess(
            existing(path),
            chosen,
            parents=[existing(each) for each in parent or ()],
            device=device_of(flags),
            spread=spread_of(flags),
            batch_size=batch_size,
            cache=cache,
            trust_code=trust_code,
        )
    _keep(path, found)
    scores = found.facts()
    if as_json:
        print_answer(scores, as_json=True)
        return
    heads = [*_HEADS, *(_OF_PARENTS if parent else ())]
    table(heads, [[facts[head] for head in heads] for facts in scores["tasks"]])
    if "retention" in scores:
        say(
            "kept of the best parent: {mean:.4f} (geometric {geometric:.4f}, worst {worst:.4f})".format_map(
                scores["retention"]
            )
        )


def _keep(path: Path, found: "Evaluation") -> None:
    """Scores of a result of ours are kept, and told in its card."""
    from mergetool.outputs.scored import tell_scores
    from mergetool.outputs.scores import keep_scores, kept_scores
    from mergetool.outputs.staging import LOCK_NAME

    if not (path / LOCK_NAME).is_file():
        return
    say(f"kept for mergetool compare: {keep_scores(path, found)}")
    if not tell_scores(path, kept_scores(path) or found):
        say("note: README.md is not what the run has written, and was left as it is")
