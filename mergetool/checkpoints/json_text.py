"""JSON files that grow: entries are put into their bytes, so that what is long in them is never taken apart."""

import json
import re
from collections.abc import Iterable, Iterator

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
"""All that tells how deep a place is: texts, in which brackets mean nothing, and brackets."""
_VALUE = re.compile(rb"\s*:\s*")
_NOTHING = re.compile(rb"null\b")


def with_entries(text: bytes, key: str, entries: Iterable[str], brackets: bytes) -> Iterator[bytes]:
    """An object's text with more entries in the list or object under a key, which it gets where it lacks it.

    It comes piece by piece: there may be as many entries as tokens.
    """
    begin, end = _place(text, key)
    before, after = (text[:begin], text[end:]) if end else _open_end(text, key)
    inside = text[begin + 1 : end - 1].strip() if text[begin:end].startswith(brackets[:1]) else b""
    yield before + brackets[:1] + inside
    for number, entry in enumerate(entries):
        yield b", " * bool(inside or number) + entry.encode()
    yield brackets[1:] + after


def _open_end(text: bytes, key: str) -> tuple[bytes, bytes]:
    """An object's text up to where the value of one more key belongs, and what follows it."""
    body = text.rstrip().removesuffix(b"}").rstrip()
    return body + b", " * (not body.endswith(b"{")) + json.dumps(key).encode() + b": ", b"}\n"


def _place(text: bytes, key: str) -> tuple[int, int]:
    """[begin, end) of the value of a key of the outermost object; (0, 0) where it has no such key."""
    for token, depth in _tokens(text):
        value = _VALUE.match(text, token.end())
        if depth == 1 and value and token[0].startswith(b'"') and json.loads(token[0]) == key:
            nothing = _NOTHING.match(text, value.end())
            return nothing.span() if nothing else (value.end(), _end(text, value.end()))
    return 0, 0


def _tokens(text: bytes) -> Iterator[tuple[re.Match[bytes], int]]:
    """Texts and brackets, with the depth they lie at."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth -= token[0] in b"}]"
        yield token, depth
        depth += token[0] in b"{["


def _end(text: bytes, begin: int) -> int:
    """Where a list or an object ends that begins here."""
    depth = 0
    for token in _TOKEN.finditer(text, begin):
        depth += (token[0] in b"{[") - (token[0] in b"}]")
        if depth == 0:
            return token.end()
    raise ValueError("no JSON")
