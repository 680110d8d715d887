"""What `mergetool analyze` finds, as an object, rows and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.analysis.page import analysis_page
from mergetool.analysis.written import write_both
from mergetool.errors import PlanError

Row = dict[str, Any]


@dataclass(frozen=True)
class Analysis:
    """What the models of a recipe are to each other."""

    facts: Mapping[str, Any]
    """All that was found, as JSON knows it."""

    @property
    def sections(self) -> tuple[str, ...]:
        """Tables that there are."""
        return tuple(self.facts["rows"])

    def rows(self, section: str) -> list[Row]:
        """A table: `pandas.DataFrame(analysis.rows("models"))`. Raises PlanError for one that there is not."""
        tables: Mapping[str, list[Row]] = self.facts["rows"]
        if section not in tables:
            raise PlanError(f"an analysis has no table {section!r}", "rows", f"one of {', '.join(tables)}")
        return tables[section]

    @property
    def advice(self) -> Sequence[Row]:
        """Problems first."""
        found: Sequence[Row] = self.facts["advice"]
        return found

    @property
    def summary(self) -> Sequence[str]:
        """A few lines for people."""
        lines: Sequence[str] = self.facts["summary"]
        return lines

    def as_dict(self) -> Mapping[str, Any]:
        return self.facts

    def to_json(self) -> str:
        """All that was found, as JSON."""
        return json.dumps(self.facts, indent=2, ensure_ascii=False)

    def write(self, folder: Path) -> Path:
        """Write `analysis.json` and the page, whose path is returned. Raises OutputError."""
        return write_both(folder, "analysis", self.to_json(), lambda: analysis_page(self.facts))


def plain(value: Any) -> Any:
    """The same as JSON knows it: what is not finite is null, six digits are enough."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, int):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
