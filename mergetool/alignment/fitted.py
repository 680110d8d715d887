"""The result of an alignment: one group element per model, applied to its tensors, and kept beside the merged weights.

    alignment/permutations.safetensors   for every model and space an int32 index array `model/space` (and signs under
                                         `model/space:sign`); its metadata name the models and the architecture's digest
    alignment/report.json                what happened: objective, gap, what moved, distances before and after

They have a folder of their own because some programs load every .safetensors file of a checkpoint's folder.
P_i maps the universe to model i, in the convention of `kernels.permute`; aligned weights are P_i^-1 W_i.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergetool.alignment.task import spec_of
from mergetool.arch.apply import transform_tensor
from mergetool.arch.spec import ArchSpec
from mergetool.errors import PlanError, SourceError
from mergetool.kernels.permute import Element
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import write_error
from mergetool.tensors.writer import write_file, write_tensors

if TYPE_CHECKING:
    from mergetool.alignment.models import Models

PERMUTATIONS, REPORT = "alignment/permutations.safetensors", "alignment/report.json"
METADATA = "mergetool"


@dataclass(frozen=True)
class Aligned:
    """One element per model: `elements[name]` maps the universe to that model."""

    spec: ArchSpec
    elements: Mapping[str, Element]
    report: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def homeward(self) -> Mapping[str, Element]:
        """The elements that map each model to the universe."""
        return {name: element.inverse() for name, element in self.elements.items()}

    def shown(self, spec: TensorSpec) -> TensorSpec:
        """What a tensor is in the universe: the same."""
        return spec

    def apply(self, model: str, name: str, tensor: Tensor) -> Tensor:
        """Tensor `name` of `model` in the universe. What the architecture does not know (integers) stays as it is."""
        if name not in self.spec.tensors:
            return tensor
        return transform_tensor(name, tensor, self.spec, self.homeward[model])

    def save(self, folder: Path) -> None:
        """Write both files, the permutations last: where they are, the report is complete. Raises OutputError."""
        arrays = {
            f"{model}/{space}": array.contiguous()
            for model, element in self.elements.items()
            for space, array in element.pack().items()
        }
        about = {"spec": self.spec.digest(), "models": list(self.elements)}
        unfinished = folder / f"{PERMUTATIONS}.unfinished"
        unfinished.parent.mkdir(exist_ok=True)
        write_file(folder / REPORT, json.dumps(self.report, indent=1) + "\n")
        try:
            write_tensors(unfinished, arrays, {METADATA: json.dumps(about)})
            unfinished.rename(folder / PERMUTATIONS)
        except OSError as error:
            raise write_error(error, str(unfinished)) from error


def load_beside(folder: Path, models: "Models") -> Aligned | None:
    """What an earlier, killed run of the same recipe left in its unfinished folder, or None."""
    if not (folder / PERMUTATIONS).is_file():
        return None
    return load(folder / PERMUTATIONS, spec_of(models), models.names)


def load(path: Path, spec: ArchSpec, names: Sequence[str]) -> Aligned:
    """Read permutations that `save` wrote. Raises SourceError if the file holds none, PlanError if it is for others."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
        elements = {
            model: Element.unpack(
                spec.spaces,
                {key.removeprefix(f"{model}/"): a for key, a in arrays.items() if key.startswith(f"{model}/")},
            )
            for model in about["models"]
            if about["spec"] == spec.digest()
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SourceError(
            f"holds no permutations ({error})", str(path), "name a file that an alignment wrote"
        ) from None
    if not elements:
        what = f"its permutations belong to another architecture, this one is {spec.family}"
        raise PlanError(what, str(path), "align these models anew")
    if set(elements) != set(names):
        what = f"it holds permutations of {', '.join(sorted(elements))}, the recipe has {', '.join(sorted(names))}"
        raise PlanError(what, str(path), "name the models alike, or align these anew")
    return Aligned(spec, elements)
