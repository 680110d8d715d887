"""Cells of tables: how a value is shown, and what it is sorted by."""

import math
import re

from mergetool.pages.parts import Cell, Column, Kind
from mergetool.units import filesize, timespan

NOTHING = "–"
_LEADING = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?")
"""The number in 0.61 ± 0.02."""


def shown(value: Cell, kind: Kind) -> str:
    """The value as people read it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    return _number(value, kind)


def _number(value: float, kind: Kind) -> str:
    match kind:
        case "bytes":
            return filesize(value)
        case "seconds":
            return timespan(value)
        case "count":
            return f"{value:,.0f}"
        case "share":
            return share(value)
        case "fixed":
            return f"{value:.3f}"
        case "signed":
            return written(value, "+.3f")
        case _:
            return short(value)


def written(value: float, form: str) -> str:
    """In a format, without the sign of what is rounded to nothing."""
    text = format(value, form)
    return text if float(text) else format(0.0, form.removeprefix("+"))


def short(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12,300, 1.2e-07. What is nearly one is not shown as one: 0.99978, 0.9999995."""
    if 0.99 < abs(value) < 1 and (rest := 1 - abs(value)) > 1e-7:
        return f"{value:.{1 - math.floor(math.log10(rest))}f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def share(value: float) -> str:
    """0.5 as 50 %, 0.00012 as 0.012 %. What is not all is not shown as all, what is not nothing not as nothing."""
    if 0 < value < 5e-7:
        return "< 0.0001 %"
    if 0.9995 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.3g} %" if abs(value) < 9.995 else f"{100 * value:,.0f} %"


def order(value: Cell, column: Column) -> str | None:
    """What a cell is sorted by where that is not its text; what has no value comes last."""
    if isinstance(value, str):
        found = _LEADING.match(value) if numeric(column) else None
        return found[0].replace(",", "") if found else None
    return None if value is None or not math.isfinite(value) else repr(float(value))


def numeric(column: Column) -> bool:
    """Whether the column stands on the right and is sorted by size."""
    return column.kind not in ("text", "code")
