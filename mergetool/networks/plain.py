"""A module that the user's own code builds, ready to run: the network of a checkpoint without a config.json.

`FUNCTION()` of a Python file returns the network, or `(network, inputs)`, whose tensors have the names of the
checkpoint. Whoever calls this has made sure that the user trusts the file.
"""

import hashlib
import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.arch.code import call
from mergetool.errors import PlanError
from mergetool.networks.library import first_line
from mergetool.networks.modules import BY_CODE, kind_of
from mergetool.networks.places import TensorMap, tensors_of
from mergetool.networks.running import RunningNetwork, read_tensor
from mergetool.networks.ways import Way
from mergetool.tensors.source import ModelSource

_FIX = "return the network of these models"


@dataclass(frozen=True)
class NetworkCode:
    """A function of a Python file that builds a network."""

    path: Path
    function: str

    @property
    def config(self) -> dict[str, Any]:
        """What stands for a config: all that decides the network."""
        return {BY_CODE: self.function, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def built(self, where: str, shapes: Collection[str]) -> nn.Module:
        """The network, which has all these tensors. Runs the file. Raises PlanError."""
        made = call(self.path, self.function, where)
        module = made[0] if isinstance(made, tuple) and made else made
        if not isinstance(module, nn.Module):
            what = f"{self.function}() returned a {type(module).__name__}"
            raise PlanError(what, where, "return a torch.nn.Module")
        if unknown := sorted(set(shapes) - set(module.state_dict())):
            raise PlanError(f"the network has no tensor {unknown[0]!r}, the models have", where, _FIX)
        return module


@dataclass(frozen=True)
class PlainNetwork(RunningNetwork):
    """A network of which nothing is known but its modules."""

    def layers(self) -> dict[str, nn.Module]:
        uses = Counter(id(each) for module in self.model.modules() for each in module._parameters.values())
        found = super().layers()
        return {n: m for n, m in found.items() if kind_of(m) != "turned" and uses[id(m._parameters["weight"])] == 1}

    @property
    def dtype(self) -> torch.dtype:
        values: Iterator[Tensor] = self.model.parameters()
        return next(each.dtype for each in values if each.is_floating_point())

    def ways(self, inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[Way]:
        yield Way(0, 1, lambda _: True, lambda place: self._answer(inputs[place]))

    def _answer(self, inputs: Mapping[str, Tensor]) -> Any:
        given = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        known = inspect.signature(self.model.forward).parameters
        alone = len(given) == 1 and not given.keys() & known.keys()
        try:
            return self.model(*given.values()) if alone else self.model(**given)
        except (ValueError, RuntimeError, TypeError, LookupError) as error:
            what = f"the data cannot be run through the network: {first_line(error)}"
            fix = f"give tensors of the shapes that it takes, named like its arguments: {', '.join(known)}"
            raise PlanError(what, self.where, fix) from error


def load_plain(
    code: NetworkCode, source: ModelSource, dtype: torch.dtype, device: torch.device, where: str
) -> PlainNetwork:
    """The network that code builds, with a model's weights. Raises PlanError."""
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    module = code.built(where, shapes)
    every = tensors_of(module)
    given = {id(every[name]) for name in shapes if name in every}
    if lost := [name for name, each in every.items() if each.is_floating_point() and id(each) not in given]:
        raise PlanError(f"the models have no tensor {lost[0]!r}, the network has", where, _FIX)
    try:
        module.load_state_dict({name: read_tensor(source, name) for name in shapes}, strict=False)
    except RuntimeError as error:
        raise PlanError(f"the models do not fit the network: {error}".replace("\n\t", " "), where, _FIX) from error
    names = TensorMap({name: name for name in shapes})
    return PlainNetwork(module.to(device, dtype).eval(), names, shapes, where)
