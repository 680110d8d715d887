"""What `mergetool compare` finds, as rows and JSON."""

import json
from dataclasses import dataclass
from typing import Any

from mergetool.outputs.difference import finite_or_text

Row = dict[str, Any]


@dataclass(frozen=True)
class ComparedRuns:
    """Finished results, side by side. Everything is rows: `pandas.DataFrame(compared.scores)`."""

    runs: tuple[str, ...]
    """What the results are called here."""
    paths: tuple[str, ...]
    base: str | None
    settings: tuple[Row, ...]
    """What recipes, inputs and versions say differently: `key`, and a value for each result."""
    scores: tuple[Row, ...]
    """For each task and result: score, its interval, and what is kept of the best parent; then the parents'."""
    retention: tuple[Row, ...]
    """For each result: mean, geometric mean and worst of what is kept, over all tasks."""
    pairs: tuple[Row, ...]
    """For each task and two results that have answered the same items: the difference, and its interval."""
    distances: tuple[Row, ...]
    """For each two results: how far their weights are apart."""
    costs: tuple[Row, ...]
    """For each result: method, time, memory, size."""
    remarks: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """A row for each result: what it cost, and its score on every task."""
        made = []
        for cost in self.costs:
            own = [row for row in self.scores if row["run"] == cost["run"]]
            made.append({**cost, **{f"{row['task']} {row['metric']}": row["score"] for row in own}})
        return made

    def as_dict(self) -> Row:
        """JSON-able data; numbers that are not finite are texts."""
        facts = {"runs": dict(zip(self.runs, self.paths, strict=True)), "base": self.base}
        parts = ("settings", "scores", "retention", "pairs", "distances", "costs", "remarks")
        return finite_or_text(facts | {name: list(getattr(self, name)) for name in parts})

    def to_json(self) -> str:
        """All that was found, as JSON."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, default=str)
