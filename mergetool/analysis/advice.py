"""What a piece of advice is, and whoever gives it: the figures, and which models have been found not to belong."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergetool.analysis.figures import Figures, Grouped

Weight = Literal["problem", "warning", "hint"]
WEIGHTS: tuple[Weight, ...] = ("problem", "warning", "hint")
"""The most urgent first."""


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do."""

    kind: str
    weight: Weight
    models: tuple[str, ...]
    title: str
    why: str
    evidence: Mapping[str, Any]
    formula: str
    fix: str

    def row(self) -> dict[str, Any]:
        return {**vars(self), "models": list(self.models), "evidence": dict(self.evidence)}


@dataclass
class Adviser:
    """Looks at figures."""

    figures: Figures
    coefficients: tuple[float, ...] | None = None
    """What the recipe multiplies task vectors by, where it adds them up."""
    out: set[str] = field(default_factory=set)
    """Models that do not belong here."""

    @property
    def whole(self) -> Grouped:
        assert self.figures.whole is not None
        return self.figures.whole

    @property
    def inside(self) -> Grouped:
        assert self.figures.inside is not None
        return self.figures.inside

    @property
    def models(self) -> tuple[str, ...]:
        return self.figures.models.models

    @property
    def based(self) -> bool:
        return self.figures.models.reference == "base"

    @property
    def has_changes(self) -> bool:
        """Whether task vectors are what models changed, not distances from their mean."""
        return self.figures.models.reference != "mean"

    @property
    def left(self) -> list[int]:
        """Models that belong here, by number."""
        return [i for i, model in enumerate(self.models) if model not in self.out]
