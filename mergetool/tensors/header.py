"""The safetensors header: parse it, doubt it, lay a new one out. Pure bytes and numbers; no torch, no files.

A file is 8 bytes of little-endian header length, that many bytes of JSON, then one buffer. Every invariant of the
format is checked before anything else believes the header: a length that fits the file, JSON without duplicate
names, known dtypes, sizes that agree with shapes, and a buffer covered exactly once, without holes or overlaps.
Stricter than the safetensors library, which also takes white space before the `{`, keys that it does not know inside an
entry, entries written as a list, metadata keys given twice, and empty tensors with an axis longer than 2^62.

Reference: https://github.com/huggingface/safetensors (format description in its README).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergetool.errors import SourceError
from mergetool.tensors.dtypes import BY_NAME, ORDER, DType

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the JSON header."""
_MAX_ELEMENTS = 1 << 62
_FIX = "the file is damaged or not a safetensors file; download or save it again"


@dataclass(frozen=True)
class TensorSpec:
    """What a header says about one tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.dtype.num_bytes(self.num_elements)


@dataclass(frozen=True)
class FilePlace:
    """A tensor's place in a file: `begin` is an absolute byte offset."""

    spec: TensorSpec
    begin: int


@dataclass(frozen=True)
class Header:
    """A checked header: every tensor's slot, the file's metadata and the size the whole file must have."""

    slots: Mapping[str, FilePlace]
    metadata: Mapping[str, str]
    file_size: int


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The JSON length announced by the first 8 bytes of a file of `file_size` bytes. Raises SourceError."""
    if len(prefix) < 8:
        raise SourceError(f"{file_size} bytes are too few for a safetensors file (8 at least)", where, _FIX)
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"the header says it is {length} bytes long; the format allows {MAX_HEADER_BYTES}", where, _FIX
        )
    if length + 8 > file_size:
        raise SourceError(
            f"the header says it is {length} bytes long, but only {file_size - 8} bytes follow", where, _FIX
        )
    return length


def parse_header(data: bytes, file_size: int, where: str) -> Header:
    """Check the JSON header `data` of a file of `file_size` bytes. Raises SourceError naming the tensor at fault."""
    document = _json_object(data, where)
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise SourceError("__metadata__ must map text to text", where, _FIX)
    if strange := next((name for name in document if not _is_text(name)), None):
        raise SourceError(f"tensor name {ascii(strange)[:100]} is not valid Unicode", where, _FIX)
    start = 8 + len(data)
    entries = sorted(
        (_entry(name, raw, f"{where}: {name[:200]}") for name, raw in document.items()), key=lambda e: e[1:]
    )
    end = 0
    slots = {}
    for spec, begin, stop in entries:
        if begin != end:
            kind = "overlap" if begin < end else "hole"
            raise SourceError(f"data_offsets begin at {begin}, expected {end} ({kind})", f"{where}: {spec.name}", _FIX)
        slots[spec.name] = FilePlace(spec, start + begin)
        end = stop
    if start + end != file_size:
        raise SourceError(f"tensors end at byte {start + end}, the file has {file_size} bytes", where, _FIX)
    return Header(slots, metadata, file_size)


def is_storable_name(name: Any) -> bool:
    """Whether a header can hold a tensor of this name."""
    return _is_text(name) and name != "__metadata__"


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise SourceError(f"the header must begin with '{{', not {data[:1]!r}", where, _FIX)
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise SourceError("the header is nested too deeply", where, _FIX) from None
    except ValueError as error:  # bad UTF-8 and bad JSON alike
        raise SourceError(f"the header is not valid JSON ({str(error)[:200]})", where, _FIX) from None
    if not isinstance(document, dict):
        raise SourceError("the header must be a JSON object", where, _FIX)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} occurs twice")
    return entries


def _is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold; JSON can also spell halves of surrogate pairs."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _entry(name: str, raw: Any, where: str) -> tuple[TensorSpec, int, int]:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise SourceError("an entry must have exactly dtype, shape and data_offsets", where, _FIX)
    dtype = BY_NAME.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise SourceError(f"unknown dtype {str(raw['dtype'])[:50]!r}", where, f"known: {', '.join(BY_NAME)}")
    shape = _sizes(raw["shape"], "shape", where)
    offsets = _sizes(raw["data_offsets"], "data_offsets", where)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(f"data_offsets {_short(offsets)} are not [begin, end]", where, _FIX)
    spec = TensorSpec(name, dtype, shape)
    if _is_too_large(shape) or spec.num_elements * dtype.bits % 8:
        raise SourceError(f"shape {_short(shape)} does not make whole bytes of {dtype.name}", where, _FIX)
    if offsets[1] - offsets[0] != spec.num_bytes:
        raise SourceError(
            f"{dtype.name} {_short(shape)} needs {spec.num_bytes} bytes, data_offsets give {offsets[1] - offsets[0]}",
            where,
            _FIX,
        )
    return spec, offsets[0], offsets[1]


def _sizes(raw: Any, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(type(size) is int and 0 <= size <= _MAX_ELEMENTS for size in raw):
        raise SourceError(f"{key} must be a list of sizes, not {_short(raw)}", where, _FIX)
    return tuple(raw)


def _is_too_large(shape: tuple[int, ...]) -> bool:
    """Whether a product of sizes, from the left, passes the limit. Stops there: millions of axes must cost no time."""
    num_elements = 1
    return any((num_elements := num_elements * size) > _MAX_ELEMENTS for size in shape)


def _short(raw: Any) -> str:
    text = str(list(raw[:20]) if isinstance(raw, list | tuple) else raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def lay_out(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """Bytes of the length and JSON for `specs`, and the header they describe.

    Same bytes as the safetensors library: by dtype, larger ones first (so that every tensor is aligned), then by name,
    JSON without spaces, padded with spaces to a multiple of 8.
    """
    ordered = sorted(specs, key=lambda spec: (ORDER[spec.dtype.name], spec.name))
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    begins = []
    for spec in ordered:
        begins.append(end)
        end += spec.num_bytes
        document[spec.name] = {
            "dtype": spec.dtype.name,
            "shape": list(spec.shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    slots = {spec.name: FilePlace(spec, start + begin) for spec, begin in zip(ordered, begins, strict=True)}
    return len(text).to_bytes(8, "little") + text, Header(slots, metadata, start + end)
