"""`mergetool diff A B`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli.answers import print_answer
from mergetool.cli.progress import ProgressBar
from mergetool.cli.show import manner, plain, say, table
from mergetool.pages.cells import short
from mergetool.units import setting

if TYPE_CHECKING:
    from mergetool.outputs.difference import Comparison

_FIGURES = ("relative", "cosine", "share_changed", "max")
_OF_CHANGES = ("change_a", "change_b", "cosine_of_changes", "share_opposed")
_MOST_SETTINGS = 20
_LONG = 60


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, an adapter, a bundle, or a mergetool.json.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    base: Annotated[str | None, typer.Option(metavar="C", help="Compare what both changed of this model.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Tensors that are shown, most changed first.")] = 20,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with 1 if they differ, as git does.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads (default: one per core).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show how two models differ: tensors, layers, roles, config, tokenizer, chat template."""
    from mergetool.api import diff as compare

    with ProgressBar(quiet=manner.quiet) as progress:
        comparison = compare(a, b, base, workers=workers, progress=progress)
    for remark in comparison.remarks:
        say(f"note: {remark}")
    if as_json:
        print(comparison.to_json())
    else:
        _show(comparison, top)
    if exit_code and not comparison.identical:
        raise typer.Exit(1)


def _show(comparison: "Comparison", top: int) -> None:
    """What people want to know, the most telling first."""
    print_answer(comparison.summary(), as_json=False)
    if comparison.identical:
        return
    columns = (*_FIGURES, *(_OF_CHANGES if comparison.base is not None else ()))
    changed = [row for row in comparison.rows if row["state"] != "identical"]
    if changed and top:
        more = f" ({top} of {len(changed)}: --top {len(changed)} shows all)" if len(changed) > top else ""
        _titled(f"Tensors, most changed first{more}", ("tensor", *columns), changed[:top])
        _titled("By layer", ("name", "tensors", "changed", *columns), comparison.layers)
        _titled("By role", ("name", "tensors", "changed", *columns), comparison.roles)
    for title, names in (("Only in the first", comparison.only_a), ("Only in the second", comparison.only_b)):
        if names:
            print(plain(f"\n{title}\n{_listed(names, top)}"))
    if comparison.reshaped:
        print("\nOf two shapes")
        table(("tensor", "a", "b"), comparison.reshaped)
    if comparison.files:
        print("\nBeside the weights")
        shown = comparison.files if manner.verbose else comparison.files[:_MOST_SETTINGS]
        table(("file", "key", "a", "b"), [(each.file, each.key, _short(each.a), _short(each.b)) for each in shown])
        if len(shown) < len(comparison.files):
            say(f"{len(comparison.files) - len(shown)} more settings: -v shows them all")


def _titled(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    print(f"\n{title}")
    heads = [column.replace("_", " ") for column in columns]
    table(heads, [[_figure(row[column]) for column in columns] for row in rows])


def _figure(value: Any) -> Any:
    return short(value) if isinstance(value, float) else value


def _listed(names: Sequence[str], top: int) -> str:
    more = [f"... and {len(names) - top} more"] if len(names) > top else []
    return "\n".join([*names[:top], *more])


def _short(value: Any) -> str:
    text = "-" if value is None else setting(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."
