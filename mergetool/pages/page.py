"""A page as one HTML file that needs nothing else: no network, no other file, no script but its own."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path

from mergetool.pages import cells
from mergetool.pages.colours import css
from mergetool.pages.parts import Chapter, Column, Page, Table
from mergetool.pages.words import anchor, pieces, visible

_HERE = Path(__file__).parent


def render(page: Page) -> str:
    """The page as HTML. Raises ModuleNotFoundError where the extra `report` is not installed."""
    import jinja2
    from markupsafe import Markup

    from mergetool.pages.pictures import drawn

    places = count()
    script = _file("page.js")
    environment = jinja2.Environment(autoescape=True)
    environment.filters |= {
        "pieces": pieces,
        "visible": visible,
        "kind": lambda part: type(part).__name__,
        "columns": _columns,
        "rows": _rows,
        "numeric": cells.numeric,
        "drawn": lambda part: Markup(drawn(part, next(places))),
    }
    return environment.from_string(_file("page.html")).render(
        page=page,
        anchors=_anchors(page.chapters),
        style=Markup(css() + _file("page.css")),
        script=Markup(script),
        digest=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _file(name: str) -> str:
    return (_HERE / name).read_text("utf-8")


@dataclass(frozen=True)
class _Shown:
    """A cell, ready to be shown."""

    text: str
    order: str | None
    numeric: bool
    code: bool


def _columns(table: Table) -> list[Column]:
    return [Column(column) if isinstance(column, str) else column for column in table.columns]


def _rows(table: Table) -> Iterator[list[_Shown]]:
    columns = _columns(table)
    for row in table.rows:
        yield [
            _Shown(
                visible(cells.shown(cell, column.kind)),
                cells.order(cell, column),
                cells.numeric(column),
                column.kind == "code",
            )
            for cell, column in zip(row, columns, strict=True)
        ]


def _anchors(chapters: Sequence[Chapter]) -> list[str]:
    """One for each chapter, no two alike."""
    made: dict[str, int] = {}
    found = []
    for chapter in chapters:
        name = anchor(chapter.title)
        made[name] = made.get(name, 0) + 1
        found.append(name if made[name] == 1 else f"{name}-{made[name]}")
    return found
