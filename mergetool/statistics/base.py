"""What a statistic is: what it has of which tensors, and how a network and examples come to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mergetool.errors import PlanError
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergetool.networks.running import RunningNetwork
    from mergetool.networks.ways import Way
    from mergetool.statistics.examples import Example

Tell = Callable[[int], None]
"""Hears how many more examples are done."""


@dataclass(frozen=True)
class Extent:
    """What a statistic of a model holds, as far as that is known before it is measured."""

    shapes: Mapping[str, tuple[int, ...]]
    """By the names of the weights that it is about."""
    turned: frozenset[str] = frozenset()
    """Weights that are stored as (inputs, outputs)."""


@dataclass(frozen=True)
class Found:
    """A statistic that was measured."""

    tensors: "MutableMapping[str, Tensor]"
    shared: MutableMapping[str, str] = field(default_factory=dict)
    """Weights whose statistic is another one's, with that one's name."""


class Statistic(ABC):
    """A measure of a model on data. Concrete ones are frozen dataclasses of settings."""

    name: ClassVar[str]
    cost: ClassVar[float]
    """Multiply-adds for each parameter and token."""
    copies: ClassVar[float] = 1.0
    """Models' worth of memory that measuring takes, with the model itself."""
    sums: ClassVar[float] = 0.0
    """Layers' worth of what is summed while gradients come back; 0 where none do."""
    by_layer: ClassVar[bool] = False
    """Whether it can be measured block by block, on a network whose weights are not all there at once."""

    plain: ClassVar[bool] = False
    """Whether it can be measured on a module that the user's own code builds, of which no config.json tells."""

    def labelled(self, config: Mapping[str, Any]) -> bool:
        """Whether rows for this model need a class."""
        return False

    @property
    def draws(self) -> bool:
        """Whether the seed matters."""
        return False

    def passes(self, rows: int) -> float:
        """How often each of so many rows goes through a network."""
        return 1.0

    def held(self, shape: Sequence[int]) -> int:
        """How many numbers of the dtype it is kept in are held of one of its tensors until that is whole."""
        return 3 * prod(shape)

    @abstractmethod
    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        """What it will hold of a model with these tensors. Raises PlanError for one that it cannot be measured on."""

    @abstractmethod
    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        """Measure it, for the weights of these names. Raises MergeError, which names the row, for what is no number."""


class Merger(Protocol):
    """Makes single tensors of the result, as the plan of a run says, while something is measured on what comes out."""

    def merged(self, name: str, found: "Mapping[str, Tensor]") -> "Tensor | None":
        """A whole tensor, by what was `found` of each model for it; None for one that the result does not have."""
        ...

    @property
    def names(self) -> Collection[str]:
        """The tensors of the result; of those that are the same one, the first."""
        ...

    def task_vectors(self, name: str) -> "tuple[Tensor, Mapping[str, Tensor]] | None":
        """A tensor of the base, and what every model changed of it; None for one that is not merged by a statistic."""
        ...


class JointStatistic(Statistic):
    """A measure of models together: what one's is depends on the others, and on how they are merged."""

    @abstractmethod
    def together(
        self,
        networks: "Mapping[str, RunningNetwork]",
        examples: "Mapping[str, Sequence[Example]]",
        merger: Merger,
        seed: int,
        tell: Tell,
    ) -> Mapping[str, Found]:
        """Measure it on all models, by their names; the networks may be changed. Raises MergeError."""

    def measure(
        self, network: "RunningNetwork", examples: "Sequence[Example]", names: Collection[str], seed: int, tell: Tell
    ) -> Found:
        what = f"{self.name} is a measure of several models and of how they are merged"
        raise PlanError(what, network.where, "run a recipe whose method needs it")


def tensor_of(batch: "Sequence[Example]", device: "torch.device") -> "dict[str, Tensor]":
    """Examples of one length as what a network takes."""
    import torch

    if batch[0].image is not None:
        from mergetool.statistics.images import read_image

        pixels = [torch.from_numpy(read_image(each.image, each.place)) for each in batch if each.image]
        return {"pixel_values": torch.stack(pixels).to(device)}
    keys = batch[0].inputs
    return {key: torch.tensor([each.inputs[key] for each in batch], device=device) for key in keys}


def through(
    way: "Way", batches: "Sequence[Sequence[Example]]", tell: Tell, begin: "Callable[[Sequence[Example]], None]"
) -> "Iterator[Any]":
    """What the network answers to each batch, of which `begin` hears before it runs."""
    for place, batch in enumerate(batches):
        begin(batch)
        yield way.run(place)
        tell(way.share(len(batch)))


@contextmanager
def hearing(modules: "Mapping[str, nn.Module]", hear: "Callable[[str, Tensor], None]") -> Iterator[None]:
    """While inside, `hear` is told what goes into each of these modules, by its name."""

    def hook(name: str) -> Any:
        return lambda _, given: hear(name, given[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
