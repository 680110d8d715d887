"""Pairs of cases: all of them in `scripts/test --long`, each case with one of the others in the suite."""

from collections.abc import Iterable
from itertools import cycle, product
from typing import Any

from tests.files import LONG


def pairs(cases: Iterable[Any], others: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Every case once, the others in turn; with LONG every case with every other."""
    return list(product(cases, others) if LONG else zip(cases, cycle(others)))
