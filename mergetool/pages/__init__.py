"""Pages for people: plain data in, one self-contained HTML file out, all in one look.

    page = Page("Title", "what one sees", [Chapter("Scores", [Table([...], [...]), Picture(lines(...), "...")])])
    write_file(path, render(page))

jinja2 and matplotlib (the extra `report`) are used here alone.
"""

from mergetool.pages.page import render
from mergetool.pages.parts import (
    Bullets,
    Chapter,
    Code,
    Column,
    Details,
    Facts,
    Finding,
    Note,
    Page,
    Picture,
    Piece,
    Table,
    Text,
)
from mergetool.pages.plots import bars, heat, lines, points

__all__ = [
    "Bullets",
    "Chapter",
    "Code",
    "Column",
    "Details",
    "Facts",
    "Finding",
    "Note",
    "Page",
    "Picture",
    "Piece",
    "Table",
    "Text",
    "bars",
    "heat",
    "lines",
    "points",
    "render",
]
