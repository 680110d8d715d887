"""Cases that are many: all of them in `scripts/test --long`, some of them in the suite."""

from collections.abc import Iterable
from itertools import cycle, product
from typing import Any

from tests.files import LONG


def pairs(cases: Iterable[Any], others: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every case once, the others in turn; with LONG every case with every other."""
    return list(product(cases, others) if LONG else zip(cases, cycle(others)))


def some(cases: Iterable[Any], step: int = 2) -> list[Any]:
    """Every second case, or every `step`-th; with LONG all of them."""
    return list(cases)[:: 1 if LONG else step]
