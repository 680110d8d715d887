"""Numbers and switches as mergekit reads them: text that says a number is one, and `yes`, `on` or 1.0 are true.

mergekit reads YAML 1.1, where `1e-5` is text and `yes` is true, and takes either as what the parameter asks for.
"""

from typing import Any

_TRUE = ("true", "yes", "on", "y", "t", "1")
_FALSE = ("false", "no", "off", "n", "f", "0")


def scalar(value: Any, kind: type) -> Any:
    """A value as bool, int or float. Raises ValueError that says what is expected."""
    if kind is bool:
        return _switch(value)
    number = _number(value)
    if kind is int and number != int(number):
        raise ValueError(f"expected a whole number, found {value!r}")
    return int(number) if kind is int else number


def _switch(value: Any) -> bool:
    word = str(value).strip().lower().removesuffix(".0")
    if word not in (*_TRUE, *_FALSE):
        raise ValueError(f"expected true or false, found {value!r}")
    return word in _TRUE


def _number(value: Any) -> float:
    if isinstance(value, bool) or str(value).lower() in ("yes", "on", "no", "off"):
        return int(_switch(value))
    try:
        number = value if isinstance(value, int | float) else float(str(value))
    except ValueError:
        number = float("nan")
    if number != number:
        raise ValueError(f"expected a number, found {value!r}")
    return number
