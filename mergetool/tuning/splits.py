"""Which items a search may see, and which are kept for the final report."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mergetool.errors import EvaluationError
from mergetool.evaluate.items import TaskItems

_FEWEST = 2


@dataclass(frozen=True)
class Splits:
    """Item ids by task; sorted, and the two disjoint."""

    search: dict[str, list[int]]
    report: dict[str, list[int]]

    @property
    def num_search(self) -> int:
        return sum(map(len, self.search.values()))

    @property
    def num_report(self) -> int:
        return sum(map(len, self.report.values()))


def split(tasks: Sequence[TaskItems], report_share: float, seed: int) -> Splits:
    """Deal every task's items out. Equal documents go to the same side. Raises EvaluationError for too few."""
    search, report = {}, {}
    for task in tasks:
        groups: dict[str, list[int]] = {}
        for item, digest in enumerate(task.hashes):
            groups.setdefault(digest, []).append(item)
        order = sorted(groups, key=lambda digest: _draw(seed, digest))
        num_report = round(report_share * len(order))
        if num_report < _FEWEST or len(order) - num_report < _FEWEST:
            what = f"has {len(order)} different items, too few to keep {report_share:.0%} of them for the report"
            raise EvaluationError(what, f"task {task.name!r}", "give it more items")
        report[task.name] = sorted(item for digest in order[:num_report] for item in groups[digest])
        search[task.name] = sorted(item for digest in order[num_report:] for item in groups[digest])
    return Splits(search, report)


def _draw(seed: int, digest: str) -> bytes:
    """A place in a random order that depends on the seed and the document alone."""
    return hashlib.sha256(f"{seed} {digest}".encode()).digest()
