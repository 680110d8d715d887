"""The pieces in a SentencePiece model, read without its library: a file of nested fields, of which two matter.

    file    field 1, again and again: a piece          piece    field 1: its text

Every field begins with a number that holds its own number and its kind; texts and pieces tell their length first.
"""

from collections.abc import Iterator

_VARINT, _LONG, _BYTES, _SHORT = 0, 1, 2, 5


def pieces_in(data: bytes) -> list[str]:
    """The texts of all pieces in order. Raises ValueError for what is not such a file."""
    return [_text(value) for number, value in _fields(data) if number == 1]


def _text(piece: bytes) -> str:
    return next((value.decode("utf-8") for number, value in _fields(piece) if number == 1), "")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field that tells its length; others are passed over."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind in (_LONG, _SHORT):
            place += 8 if kind == _LONG else 4
        elif kind == _BYTES:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("the file ends inside a field")
            yield key >> 3, data[place : place + length]
            place += length
        else:
            raise ValueError(f"there is no kind {kind} of field")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    number = shift = 0
    while place < len(data):
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
    raise ValueError("the file ends inside a number")
