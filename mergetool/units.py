"""Amounts as people read them, three digits and a unit that fits, and as they write them."""

import json
import math
import re
from typing import Any

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def filesize(count: float) -> str:
    """Bytes of files and transfers in powers of 1000: 512 B, 3.6 kB, 1.2 GB."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def memsize(count: float) -> str:
    """Bytes of memory in powers of 1024: 300 MiB, 3.4 GiB."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def timespan(seconds: float) -> str:
    """40 ms, 0.4 s, 25 s, 3 min, 2.5 h."""
    if seconds < 0.095:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def setting(value: Any) -> str:
    """A value of a recipe or of config.json, as it is written there; a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def several(count: int, what: str) -> str:
    """1 tensor; 12,345 tensors."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def counted(count: int) -> str:
    """12,345; 1.58 million; 7.24 billion."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def _scaled(count: float, step: int, units: tuple[str, ...]) -> str:
    """The number in the first unit in which it needs no more than three digits before the point."""
    unit, *larger = units
    while count >= 999.5 and larger:
        count /= step
        unit = larger.pop(0)
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"


def parse_size(value: Any) -> int:
    """Bytes of `5GB`, `1.5GiB`, `800MB` or a plain number. Raises ValueError saying what is expected."""
    if type(value) is int and value > 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a size such as 5GB, 500MB or 2GiB")
    unit = match.group(2).lower().removesuffix("b")
    factor = _BINARY_UNITS[unit[0]] if unit.endswith("i") and len(unit) == 2 else _UNITS.get(unit, 0)
    size = float(match.group(1)) * factor
    if factor == 0 or not 1 <= size < math.inf:
        raise ValueError("expected a size such as 5GB, 500MB or 2GiB")
    return int(size)
