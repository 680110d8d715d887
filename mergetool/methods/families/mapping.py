"""What the methods share that mix units: maps of every space, one after the other in the network's order."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from mergetool.alignment.models import Fitted, Models
from mergetool.methods.families.aligning import AligningMethod

if TYPE_CHECKING:
    from mergetool.alignment.maps import Evidence, Mapped, UnitMap


class MappingMethod(AligningMethod):
    """A method that finds for each space how the units of every model make those of the result."""

    @model_validator(mode="after")
    def _repairs_statistics_only(self) -> Self:
        if self.repair.mode == "full":
            raise ValueError("units that are mixed have no parents to be repaired after: write mode: bn-stats, or none")
        return self

    @abstractmethod
    def maps(self, evidence: "Evidence", space: str) -> "Sequence[UnitMap]":
        """The maps of every model for a space, by what tells its units apart."""

    def search(self, models: Models) -> "Mapped":
        from mergetool.alignment.maps import Evidence, Mapped

        evidence = Evidence(self.match, models)
        mapped = evidence.spaces()
        for space in mapped:
            for model, found in zip(models.names, self.maps(evidence, space), strict=True):
                evidence.maps[model][space] = found
        spaces = evidence.spec.spaces
        left = [name for name, each in spaces.items() if each.symmetry != "fixed" and name not in mapped]
        if left:
            why = "have heads or signs, or do not show which layer writes them (no biases)"
            models.say(f"units of {', '.join(left)} {why}: they stay in their order")
        report = {"method": self.method_name(), "models": list(models.names), "spaces": list(mapped)}
        return Mapped(evidence.spec, evidence.maps, report)

    def load(self, models: Models, folder: Path) -> Fitted | None:
        from mergetool.alignment.maps import load_maps

        return load_maps(folder, models)
