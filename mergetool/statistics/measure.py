"""One statistic of one model: taken from where it is kept, or measured now."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError
from mergetool.statistics.activation import InputActivation
from mergetool.statistics.base import Extent, JointStatistic, Statistic
from mergetool.statistics.coefficients import Coefficients
from mergetool.statistics.examples import BATCH_TOKENS, Example
from mergetool.statistics.features import PooledFeatures
from mergetool.statistics.fisher import DiagonalFisher
from mergetool.statistics.gradient import LossGradient
from mergetool.statistics.gram import InputGram
from mergetool.statistics.loss import MeanLoss
from mergetool.statistics.prefix import PrefixGram
from mergetool.statistics.store import StatisticStore, key_of
from mergetool.tensors.dtypes import BY_TORCH_NAME, torch_dtype
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    import torch

    from mergetool.networks.plain import NetworkCode
    from mergetool.networks.running import RunningNetwork
    from mergetool.networks.spread import Spread

_KINDS: tuple[type[Statistic], ...] = (
    Coefficients,
    DiagonalFisher,
    InputActivation,
    InputGram,
    LossGradient,
    MeanLoss,
    PooledFeatures,
    PrefixGram,
)
STATISTICS: Mapping[str, type[Statistic]] = {kind.name: kind for kind in _KINDS}
"""Every statistic by name."""
_KEPT = 3
"""What is kept of each token while networks run layer by layer: what the last block made, what was there before it."""
_DEALS = (1, 2, 4)
"""In how many parts gradients of a block may be taken. Each has the block run there and back once more."""
_LIBRARY_BYTES = 200_000_000
"""transformers itself, measured."""


@dataclass(frozen=True)
class Measuring:
    """What is to be measured on a model."""

    statistic: Statistic
    model: ModelSource
    config: Mapping[str, Any]
    """All of its config, defaults too."""
    examples: tuple[Example, ...]
    form: Extent
    dtype: str
    """What the network computes in, and the statistic is kept in."""
    seed: int
    where: str
    """What messages call the model."""
    code: "NetworkCode | None" = None
    """What builds its network, if config.json does not tell that."""
    guessed: bool = False
    """Whether the tokens of examples are not known yet."""

    @property
    def is_joint(self) -> bool:
        """Whether it is measured on all models at once."""
        return isinstance(self.statistic, JointStatistic)

    @property
    def tokens(self) -> int:
        return sum(each.length for each in self.examples)

    @property
    def num_bytes(self) -> int:
        """What is kept, at most."""
        return sum(self._width * _product(shape) for shape in self.form.shapes.values())

    @property
    def memory(self) -> int:
        """Bytes that measuring takes, roughly."""
        weights = sum(spec.num_elements for spec in self.model.specs.values())
        return _LIBRARY_BYTES + int(self._width * weights * self.statistic.copies) + 2 * self.num_bytes

    def memory_in(self, room: int) -> int:
        """Bytes that measuring takes, roughly, where there is room for so many."""
        return self.memory_by_layer(self.deals(room)) if self.is_layered(room) else self.memory

    def is_layered(self, room: int) -> bool:
        """Whether the network runs layer by layer, because it does not fit in so many bytes."""
        return self.statistic.by_layer and self.code is None and self.memory > room

    def deals(self, room: int) -> int:
        """In how many parts gradients of a block are taken where there is room for so many bytes."""
        if not self.statistic.sums:
            return 1
        return next((each for each in _DEALS if self.memory_by_layer(each) <= room), _DEALS[-1])

    def memory_by_layer(self, deals: int = _DEALS[-1]) -> int:
        """Bytes that measuring layer by layer takes, roughly: one, its sums, and what it makes of all rows."""
        sizes = {name: spec.num_elements for name, spec in self.model.specs.items()}
        weights = _largest(sizes) + max(sizes.values(), default=0)
        if self.statistic.sums:
            sums = int(self.statistic.sums / deals * _largest(sizes)) + max(sizes.values(), default=0)
        else:
            sums = _largest({name: self.statistic.held(shape) for name, shape in self.form.shapes.items()})
        wide = [spec.shape for spec in self.model.specs.values() if len(spec.shape) == 2]
        widest, width = max(map(max, wide), default=0), max(wide, default=(0, 0))[1]
        longest = max(BATCH_TOKENS, *(each.length for each in self.examples))
        passing = _KEPT * self.tokens * width + 2 * min(self.tokens, longest) * widest
        return _LIBRARY_BYTES + self._width * (weights + sums + passing)

    @property
    def flops(self) -> float:
        """Multiply-adds."""
        cost = self.statistic.cost * self.statistic.passes(len(self.examples))
        return cost * self.tokens * sum(spec.num_elements for spec in self.model.specs.values())

    @property
    def _width(self) -> int:
        return BY_TORCH_NAME[self.dtype].bits // 8

    def describe(self) -> dict[str, Any]:
        """What is measured, as JSON-able data."""
        settings = {**vars(self.statistic), **({"seed": self.seed} if self.statistic.draws else {})}
        told = {"statistic": self.statistic.name, "rows": len(self.examples), "tokens": self.tokens}
        return {**told, "settings": settings, "dtype": self.dtype, "bytes": self.num_bytes}

    def key(self) -> str:
        """The hash of all that decides it."""
        return key_of(self.statistic, self.model, self.config, self.examples, self.dtype, self.seed)


def _largest(sizes: Mapping[str, int]) -> int:
    """The size of the largest layer: of tensors whose names begin alike, up to the first number."""
    layers = Counter[str]()
    for name, size in sizes.items():
        number = re.search(r"\.\d+\.", name)
        layers[name[: number.end()] if number else name] += size
    return max(layers.values(), default=0)


def _product(shape: Sequence[int]) -> int:
    from math import prod

    return prod(shape)


@dataclass(frozen=True)
class Running:
    """Where networks run that something is measured on."""

    device: "torch.device"
    room: int
    """Bytes that it may take."""
    spread: "Spread | None" = None
    """How they are dealt over devices, memory and the disk, if not on that device."""


def opened(asked: Measuring, running: Running, place: Path) -> "RunningNetwork":
    """The network of a model that is to be measured; what is done of it may lie at `place`.

    Raises SourceError, PlanError or OutputError.
    """
    dtype = torch_dtype(BY_TORCH_NAME[asked.dtype])
    if running.spread is None and asked.is_layered(running.room):
        from mergetool.networks.by_layer import load_by_layer

        return load_by_layer(asked.model, dtype, running.device, asked.where, place, asked.deals(running.room))
    if asked.code is not None:
        from mergetool.networks.plain import load_plain

        if running.spread is not None:
            what = "a module that code builds is not dealt out"
            raise PlanError(what, "--device-map", "leave it out")
        return load_plain(asked.code, asked.model, dtype, running.device, asked.where)
    from mergetool.networks.running import load_network

    return load_network(asked.model, dtype, running.device, asked.where, running.spread)


def measured(asked: Measuring, store: StatisticStore, key: str, running: Running, tell: Callable[[int], None]) -> Path:
    """Where a statistic lies, which is measured first if it is not there. `tell` hears of examples that are done."""
    import torch

    if store.has(key):
        tell(len(asked.examples))
        return store.path(key)
    network = opened(asked, running, store.begun(key))
    with network.finishing():
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
            found = asked.statistic.measure(network, asked.examples, list(asked.form.shapes), asked.seed, tell)
        return store.keep(key, found, sorted(asked.form.turned))
