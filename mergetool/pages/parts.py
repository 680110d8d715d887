"""What a page is made of: plain data, without a word of HTML. Every text is shown as it is, whatever it contains.

In texts (not in cells, titles of columns and names of rows) `backquoted` words are shown as code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind: TypeAlias = Literal["text", "code", "number", "fixed", "signed", "share", "count", "bytes", "seconds"]
Level: TypeAlias = Literal["plain", "good", "warn", "bad"]
Cell: TypeAlias = str | float | int | bool | None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Sentences one below the other."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A recipe or a command, as it is."""

    text: str


@dataclass(frozen=True)
class Note:
    """A sentence that must not be overlooked."""

    text: str
    level: Level = "plain"


@dataclass(frozen=True)
class Finding:
    """What to do, what it follows from, and by which formula; `fix` can be typed."""

    title: str
    text: str = ""
    evidence: Sequence[str] = ()
    formula: str = ""
    fix: str = ""
    level: Level = "plain"


@dataclass(frozen=True)
class Facts:
    """A few important figures, large: (name, value)."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Column:
    """How one column is headed and how its cells are shown.

    number: three digits; fixed: three places; signed: with its sign; share: 0.5 as 50 %; count: 12,345. A text in
    a column of numbers is shown as it is, and sorted by the number it begins with.
    """

    name: str
    kind: Kind = "text"
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values (None is shown as a dash); sorted by a click on a column.

    Of more than `show` rows the rest waits behind a button. Rows whose places are in `strong` stand out.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    show: int = 25
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A plot: `draw` gets matplotlib's axes. The caption tells what one sees."""

    draw: "Callable[[Axes], None]"
    caption: str = ""
    size: tuple[float, float] = (8.0, 3.6)


@dataclass(frozen=True)
class Details:
    """Parts that only some readers want: folded."""

    title: str
    parts: "Sequence[Piece]"


Piece: TypeAlias = Text | Bullets | Code | Note | Finding | Facts | Table | Picture | Details


@dataclass(frozen=True)
class Chapter:
    """A heading that the contents list names; its lead says in a sentence what one sees and what to do about it."""

    title: str
    parts: Sequence[Piece] = ()
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page. `foot` says what made it."""

    title: str
    lead: str = ""
    chapters: Sequence[Chapter] = ()
    intro: Sequence[Piece] = field(default=())
    foot: str = "mergetool"
