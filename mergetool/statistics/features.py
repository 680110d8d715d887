"""What a network makes of rows on the whole: what its last block says, the mean over a row's tokens, then over rows.

One vector that all weights share, in a shape that no weight has: (1, 1, 1, channels).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.errors import PlanError
from mergetool.statistics.base import Extent, Found, Statistic, Tell, tensor_of, through
from mergetool.statistics.gram import not_finite
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class PooledFeatures(Statistic):
    """The mean of what the last block says, every row counting alike."""

    name: ClassVar = "features"
    cost: ClassVar = 1.0
    copies: ClassVar = 2.0
    by_layer: ClassVar = True

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        shape = (1, 1, 1, _width(config, where))
        return Extent({name: shape for name, spec in specs.items() if spec.dtype.is_float})

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        import torch

        from mergetool.statistics.examples import batches

        sums, rows, found = _Sums(network.where), list(batches(examples)), Found(network.keeping())
        first, *others = sorted(names)
        hook = _last_block(network).register_forward_hook(sums.add)
        try:
            with torch.no_grad():
                for way in network.ways([tensor_of(batch, network.device) for batch in rows]):
                    for _ in through(way, rows, tell, sums.begin):
                        pass
                    if sums.said:
                        mean = torch.stack(sums.said).sum(0) / len(examples)
                        found.tensors[first] = mean.to(network.model.dtype).view(1, 1, 1, -1)
                        sums.said.clear()
        finally:
            hook.remove()
        return Found(found.tensors, dict.fromkeys(others, first))


@dataclass
class _Sums:
    where: str
    batch: "Sequence[Example]" = ()

    def __post_init__(self) -> None:
        self.said: list[Tensor] = []

    def begin(self, batch: "Sequence[Example]") -> None:
        """What comes next is of this batch."""
        self.batch = batch

    def add(self, block: object, given: object, made: Any) -> None:
        """Count what the block says of a batch, (rows, tokens, channels)."""
        states = made[0] if isinstance(made, tuple) else made
        total = states.double().mean(1).sum(0).cpu()
        if not bool(total.isfinite().all()):
            raise not_finite("what the last block says", self.batch, self.where)
        self.said.append(total)


def _last_block(network: "RunningNetwork") -> Any:
    from mergetool.networks.ways import blocks_of

    if not (blocks := blocks_of(network.model)):
        fix = "choose a method that needs no data: mergetool methods"
        raise PlanError("has no row of blocks, so none of them is the last", network.where, fix)
    return blocks[-1]


def _width(config: Mapping[str, Any], where: str) -> int:
    parts = (config, config.get("text_config") or {})
    found = next((part[key] for part in parts for key in _WIDTHS if isinstance(part.get(key), int)), None)
    if found is None:
        what = f"its config does not say how wide its layers are ({', '.join(_WIDTHS)})"
        raise PlanError(what, where, "choose a method that needs no data: mergetool methods")
    return int(found)
