"""Inner products of what goes into each linear layer: the mean of `x x^T` over all tokens.

They are summed in float64, each pair of channels once. Layers that are given the same tensor (query, key and value;
gate and up) share one matrix.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.errors import MergeError, PlanError
from mergetool.statistics.base import Extent, Found, Statistic, Tell, hearing, tensor_of, through
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergetool.kernels.triangle import SymmetricSum
    from mergetool.networks.kept import Keeping
    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example

_ROWS = 1024
"""Rows that are multiplied at once."""


@dataclass(frozen=True)
class InputGram(Statistic):
    """`X^T X / number of tokens` of the inputs X of each linear layer."""

    name: ClassVar = "gram"
    cost: ClassVar = 2.0
    copies: ClassVar = 2.0
    by_layer: ClassVar = True
    plain: ClassVar = True

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        from mergetool.networks.modules import linears_of

        turned = linears_of(specs, config, where, "choose a method that needs no data: mergetool methods")
        if not turned:
            raise PlanError("has no linear layer", where, "choose merge: {method: linear}")
        widths = {name: specs[name].shape[0 if turned[name] else 1] for name in turned}
        shapes = {name: (width, width) for name, width in widths.items()}
        return Extent(shapes, frozenset(name for name in turned if turned[name]))

    def held(self, shape: Sequence[int]) -> int:
        from mergetool.kernels.triangle import TILE, numbers_of

        return 2 * numbers_of(shape[0]) + 3 * min(TILE, shape[0]) * shape[0]

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        import torch

        from mergetool.statistics.examples import batches

        linears = {name: module for name, module in network.linears().items() if name in names}
        rows, kept = list(batches(examples)), network.keeping()
        with torch.no_grad():
            for way in network.ways([tensor_of(batch, network.device) for batch in rows]):
                sums = InputSums(network.where)
                with sums.watching({name: module for name, module in linears.items() if way.has(module)}):
                    for _ in through(way, rows, tell, sums.begin):
                        pass
                own = {name: module for name, module in linears.items() if way.has(module)}
                sums.give(own, network.dtype, kept)
        for name in set(names).difference(linears):  # a matrix of a plain module that is no linear layer's
            kept[name] = torch.zeros(2 * network.shapes[name][1:], dtype=network.dtype)
        return Found(kept, kept.shared)


@dataclass
class InputSums:
    """What has gone into the layers so far."""

    where: str
    batch: "Sequence[Example]" = ()
    _totals: "dict[str, SymmetricSum]" = field(default_factory=dict)
    _waiting: "dict[str, list[Tensor]]" = field(default_factory=dict)
    """Inputs that are still to be multiplied: a product of many rows costs hardly more than one of few."""
    _leaders: dict[str, str] = field(default_factory=dict)
    _last: "tuple[Tensor | None, str]" = (None, "")
    """What went into the layer before, and which layer's sum it was added to."""

    @contextmanager
    def watching(self, linears: "Mapping[str, nn.Module]") -> Iterator[None]:
        """While inside, whatever goes into these layers is added up."""
        try:
            with hearing(linears, self.add):
                yield
        finally:
            self._last = None, ""

    def begin(self, batch: "Sequence[Example]") -> None:
        """What comes next is of this batch."""
        self.batch = batch

    def add(self, name: str, inputs: "Tensor") -> None:
        """Count what goes into a layer, unless it was counted for the layer before."""
        before, leader = self._last
        if before is inputs and self._leaders.setdefault(name, leader) == leader:
            return
        if self._leaders.get(name, name) != name:  # it was given another layer's input until now
            self._part(name)
        self._leaders[name] = name
        self._last = inputs, name
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        self._keep(name, rows.clone())  # a network may go on to change it in place

    def _part(self, name: str) -> None:
        leader = self._leaders[name]
        self._multiply(leader)
        self._totals[name] = self._totals[leader].copy()

    def _keep(self, name: str, rows: "Tensor") -> None:
        if not bool(rows.isfinite().all()):
            raise not_finite(f"what goes into {name}", self.batch, self.where)
        waiting = self._waiting.setdefault(name, [])
        waiting.append(rows)
        if sum(map(len, waiting)) >= _ROWS:
            self._multiply(name)

    def _multiply(self, name: str) -> None:
        import torch

        from mergetool.kernels.triangle import SymmetricSum

        if not (waiting := self._waiting.pop(name, [])):
            return
        rows = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
        self._totals.setdefault(name, SymmetricSum(rows.shape[1])).add(rows)

    def has(self, name: str) -> bool:
        """Whether something has gone into a layer."""
        return name in self._leaders

    def found(self, linears: "Mapping[str, nn.Module]", dtype: Any) -> Found:
        """Means; zeros for layers that nothing went into."""
        from mergetool.networks.kept import KeptInMemory

        kept = KeptInMemory()
        self.give(linears, dtype, kept)
        return Found(kept, kept.shared)

    def give(self, linears: "Mapping[str, nn.Module]", dtype: Any, kept: "Keeping") -> None:
        """Keep means, one after the other; of other layers than these, whatever was summed stays."""
        for name, module in linears.items():
            leader = self._leaders.get(name, name)
            self._multiply(name)
            if leader != name:
                kept.shared[name] = leader
            elif name in self._totals:
                kept.gather(name, self._fitting(name, self._totals.pop(name).means(dtype)))
            else:
                kept[name] = _nothing(module, dtype)

    def _fitting(self, name: str, pieces: "Iterator[Tensor]") -> "Iterator[Tensor]":
        for piece in pieces:
            if not bool(piece.isfinite().all()):
                what = f"the squares of what goes into {name} are too large"
                raise MergeError(
                    what, self.where, "write compute: {dtype: float64}, or leave out rows that are far off"
                )
            yield piece


def _nothing(module: Any, dtype: Any) -> "Tensor":
    import torch

    width = module.in_features if hasattr(module, "in_features") else module.weight.shape[0]
    return torch.zeros(width, width, dtype=dtype)


def not_finite(what: str, batch: "Sequence[Example]", where: str) -> MergeError:
    """The error for numbers that are none, at the first of the rows that they can come from."""
    several = f" (or one of {len(batch) - 1} other rows of its length)" if len(batch) > 1 else ""
    fix = "repair or replace that model (mergetool verify FOLDER scans it), or remove that line"
    return MergeError(f"{what} is not finite at {batch[0].place}{several}", where, fix)
