"""A study's results as a page: its Markdown, with pictures before it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergetool.pages import Chapter, Column, Page, Picture, Piece, Table, Text, render

_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")


def write_page(path: Path, title: str, text: str, pictures: Mapping[str, Sequence[Picture]]) -> None:
    """`pictures`: heading -> what stands below it."""
    drawn = [Chapter(heading, each) for heading, each in pictures.items()]
    lead, *told = _chapters(text)
    path.write_text(render(Page(title, lead.lead, [*drawn, *told])), "utf-8")


def _chapters(text: str) -> Iterator[Chapter]:
    """What stands before the first heading as the lead of a chapter without a title, then one for each heading."""
    first, *rest = re.split(r"^#+ ", text, flags=re.M)
    if text.startswith("# ") and rest and "|" not in rest[0]:  # the title of the page
        first = rest.pop(0).partition("\n")[2]
    yield Chapter("", lead=" ".join(first.split()))
    for part in rest:
        title, _, body = part.partition("\n")
        yield Chapter(title.strip(), list(_pieces(body)))


def _pieces(body: str) -> Iterator[Piece]:
    for block in filter(None, (each.strip() for each in body.split("\n\n"))):
        yield _table(block) if block.startswith("|") else Text(" ".join(block.split()))


def _table(block: str) -> Table:
    """A column of numbers is one where every cell begins with a number, or is empty; a row in bold stands out."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
    heads, rows = lines[0], lines[2:]
    strong = [place for place, row in enumerate(rows) if row[0].startswith("**")]
    rows = [[cell.strip("*") for cell in row] for row in rows]
    kinds = [all(not cell or _NUMBER.match(cell) for cell in column) for column in zip(*rows, strict=True)]
    columns = [Column(head, "number" if kind else "text") for head, kind in zip(heads, kinds, strict=False)]
    return Table(columns, [[cell or None for cell in row] for row in rows], strong=strong)
