"""One statistic of one model: taken from where it is kept, or measured now."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.statistics.activation import InputActivation
from mergetool.statistics.base import Extent, JointStatistic, Statistic
from mergetool.statistics.coefficients import Coefficients
from mergetool.statistics.examples import Example
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

    from mergetool.networks.running import RunningNetwork

_KINDS: tuple[type[Statistic], ...] = (
    Coefficients,
    DiagonalFisher,
    InputActivation,
    InputGram,
    LossGradient,
    MeanLoss,
    PrefixGram,
)
STATISTICS: Mapping[str, type[Statistic]] = {kind.name: kind for kind in _KINDS}
"""Every statistic by name."""
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


def _product(shape: Sequence[int]) -> int:
    from math import prod

    return prod(shape)


def opened(asked: Measuring, device: "torch.device") -> "RunningNetwork":
    """The network of a model that is to be measured. Raises SourceError."""
    from mergetool.networks.running import load_network

    return load_network(asked.model, torch_dtype(BY_TORCH_NAME[asked.dtype]), device, asked.where)


def measured(
    asked: Measuring, store: StatisticStore, key: str, device: "torch.device", tell: Callable[[int], None]
) -> Path:
    """Where a statistic lies, which is measured first if it is not there. `tell` hears of examples that are done."""
    import torch

    if store.has(key):
        tell(len(asked.examples))
        return store.path(key)
    network = opened(asked, device)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
        found = asked.statistic.measure(network, asked.examples, list(asked.form.shapes), asked.seed, tell)
    return store.keep(key, found, sorted(asked.form.turned))
