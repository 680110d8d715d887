"""The first pass through a bundle: how near every sample is to every task.

The base (or the merged model) runs as far as the last matrix that the router reads, and no further. What goes into
those matrices, pooled over tokens, is compared with the directions that each task's own update of them acts on.

Reference: Crisostomi et al., MASS, https://arxiv.org/abs/2504.05342, section 3.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergetool.bundle.build import FIRST_PASS
from mergetool.bundle.factors import TaskFactors
from mergetool.bundle.manifest import Router
from mergetool.bundle.readout import pool_tokens
from mergetool.errors import SourceError
from mergetool.kernels.routing import mean_distance

if TYPE_CHECKING:
    from mergetool.bundle.hf import LoadedBase

_UNUSED = ("labels", "past_key_values", "use_cache")
"""Inputs that only the outputs need, which a first pass never gets to."""


class _Stop(Exception):  # noqa: N818  (no error: it ends the pass)
    pass


class FirstPass:
    """What a router reads in a model, and what it compares that with."""

    def __init__(self, base: "LoadedBase", factors: TaskFactors, router: Router, folder: Path) -> None:
        self._model = base.model
        self._names = base.names
        self._router = router
        self.modules = _modules(base, router, folder)
        turned = [type(module).__name__ == "Conv1D" for module in self.modules]  # GPT-2's linear layers
        self.bases = factors.bases(router.matrices, turned)
        merged = folder / FIRST_PASS
        self._weights = load_file(merged) if merged.is_file() else {}

    def to(self, device: torch.device) -> None:
        """Keep everything on `device`, where the model is."""
        self.bases = [[basis.to(device) for basis in bases] for bases in self.bases]
        self._weights = {name: value.to(device) for name, value in self._weights.items()}

    def distances(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(samples, tasks): the distance of each sample from the span of each task's directions."""
        return mean_distance(self.features(inputs), self.bases, self._router.norm)

    def features(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Pooled inputs (samples, features), float32, of every routing matrix. Stops the pass at the last one."""
        mask = inputs.get("attention_mask")
        found: dict[int, Tensor] = {}
        pooled: dict[int, tuple[Tensor, Tensor]] = {}  # query, key and value read the same tensor: pool it once

        def read(place: int, x: Tensor) -> None:
            if place not in found:
                if id(x) not in pooled:
                    pooled[id(x)] = x, pool_tokens(x.float(), mask, self._router.pool)
                found[place] = pooled[id(x)][1]
            if len(found) == len(self.modules):
                raise _Stop

        hooks = [
            module.register_forward_pre_hook(lambda _, arguments, place=place: read(place, arguments[0]))
            for place, module in enumerate(self.modules)
        ]
        try:
            with self._merged():
                self._model(**{key: value for key, value in inputs.items() if key not in _UNUSED})
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [found[place] for place in range(len(self.modules))]

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """While inside, the model has the merged weights, if routing features come from those."""
        originals = []
        for name, parameter in self._model.named_parameters() if self._weights else ():
            if (merged := self._weights.get(self._names.get(name, ""))) is not None:
                originals.append((parameter, parameter.data))
                parameter.data = merged.to(parameter)
        try:
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data


def _modules(base: "LoadedBase", router: Router, folder: Path) -> list[nn.Module]:
    """The modules whose weights are the routing matrices, in their order."""
    known, found = set(router.matrices), dict[str, nn.Module]()
    for path, module in base.model.named_modules():
        if (name := base.names.get(f"{path}.weight")) in known and name is not None:
            found[name] = module
    if missing := known - found.keys():
        what = f"the model has no module with weight {min(missing)!r}, which routing reads"
        raise SourceError(what, str(folder), "use the transformers version that the base was saved with")
    return [found[name] for name in router.matrices]
