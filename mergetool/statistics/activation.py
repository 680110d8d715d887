"""How large what goes into each layer is: the mean absolute value of every input channel over all tokens.

Of linear layers and norms; not of embeddings, into which numbers of tokens go. It is stored in a shape that spreads
over the weight: (1, inputs), (inputs, 1) where a weight is stored turned, (channels,) of a norm.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.statistics.base import Extent, Found, Statistic, Tell, hearing, tensor_of, through
from mergetool.statistics.gram import not_finite
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.modules import Kind
    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example


@dataclass(frozen=True)
class InputActivation(Statistic):
    """Mean of `|x_j|` over tokens, for each input channel j of each layer."""

    name: ClassVar = "activation"
    cost: ClassVar = 1.0
    copies: ClassVar = 2.0
    by_layer: ClassVar = True

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        from mergetool.networks.modules import layers_of

        kinds = layers_of(specs, config, where, "leave out the step that needs data")
        return Extent({name: _form(specs[name].shape, kind) for name, kind in kinds.items()})

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        import torch

        from mergetool.networks.modules import kind_of
        from mergetool.statistics.examples import batches

        layers = {name: module for name, module in network.layers().items() if name in names}
        rows, found = list(batches(examples)), Found(network.keeping())
        with torch.no_grad():
            for way in network.ways([tensor_of(batch, network.device) for batch in rows]):
                sums = _Sums(network.where)
                with hearing({name: module for name, module in layers.items() if way.has(module)}, sums.add):
                    for _ in through(way, rows, tell, sums.begin):
                        pass
                for name, module in layers.items():
                    if way.has(module):
                        shape = _form(network.shapes[name], kind_of(module))
                        found.tensors[name] = sums.mean(name, shape, network.model.dtype)
        return found


def _form(shape: Sequence[int], kind: "Kind | None") -> tuple[int, ...]:
    if kind == "vector":
        return tuple(shape)
    return (shape[0], 1) if kind == "turned" else (1, shape[1])


@dataclass
class _Sums:
    """Absolute values so far (float64), and of how many tokens."""

    where: str
    batch: "Sequence[Example]" = ()
    _totals: "dict[str, Tensor]" = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def begin(self, batch: "Sequence[Example]") -> None:
        """What comes next is of this batch."""
        self.batch = batch

    def add(self, name: str, inputs: "Tensor") -> None:
        """Count what goes into a layer."""
        import torch

        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        total = rows.abs().sum(0, dtype=torch.float64)
        if not bool(total.isfinite().all()):
            raise not_finite(f"what goes into {name}", self.batch, self.where)
        self._totals[name] = self._totals[name] + total if name in self._totals else total
        self._counts[name] = self._counts.get(name, 0) + len(rows)

    def mean(self, name: str, shape: tuple[int, ...], dtype: Any) -> "Tensor":
        """Means; zeros for a layer that nothing went into."""
        import torch

        if name not in self._totals:
            return torch.zeros(shape, dtype=dtype)
        return (self._totals[name] / self._counts[name]).to(dtype).cpu().view(shape)
