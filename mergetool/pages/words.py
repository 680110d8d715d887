"""Texts of strangers, such as names of models, made safe to show."""

import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)
_CODE = re.compile(r"`([^`\n]+)`")


def visible(text: str) -> str:
    """The text with a mark for every character that cannot be seen, or that turns the order of what follows."""
    return _UNSEEN.sub("\ufffd", text)


MOST_OF_ROW = 40
"""Characters of a name at the left of a plot, where there is more room."""


def label(name: str, most: int = 28) -> str:
    """A name for an axis: of a long one the beginning and the end."""
    name = visible(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def pieces(text: str) -> list[tuple[bool, str]]:
    """The text cut at backquotes: (whether it is code, piece)."""
    return [(place % 2 == 1, piece) for place, piece in enumerate(_CODE.split(visible(text))) if piece]


def anchor(title: str) -> str:
    """What a link to a chapter ends with. Never empty, and never a name that the page itself uses."""
    words = re.sub(r"[^\w]+", "-", visible(title).lower()).strip("-")
    return f"s-{words}"
