"""Inner products of what goes into each linear layer where all blocks below it are merged already.

Block by block: rows of every model go through the merged blocks (whose last output is kept for each batch), then
through its own next block, whose inputs are summed up; that block is merged by them in every network.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.errors import PlanError
from mergetool.statistics.base import Extent, Found, JointStatistic, Merger, Tell, tensor_of
from mergetool.statistics.gram import InputGram, InputSums
from mergetool.tensors.header import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergetool.networks.running import RunningNetwork
    from mergetool.statistics.examples import Example


class _EnoughError(Exception):
    """The rest of the network need not run."""


@dataclass(frozen=True)
class PrefixGram(JointStatistic):
    """`X^T X / number of tokens` of the inputs X of each linear layer, behind merged blocks."""

    name: ClassVar = "merged-gram"
    cost: ClassVar = 3.0
    copies: ClassVar = 2.0

    def form(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Extent:
        return InputGram().form(specs, config, where)

    def together(
        self,
        networks: "Mapping[str, RunningNetwork]",
        examples: "Mapping[str, Sequence[Example]]",
        merger: Merger,
        seed: int,
        tell: Tell,
    ) -> Mapping[str, Found]:
        from mergetool.statistics.examples import batches

        chains = {name: _Chain(network, list(batches(examples[name]))) for name, network in networks.items()}
        first = next(iter(chains.values()))
        names = set().union(*(chain.network.shapes for chain in chains.values()))
        linears = set().union(*(chain.linears for chain in chains.values()))
        inside = [set(first.names_of(block)) for block in range(first.length)]
        outside = names.difference(*inside)
        _put(chains, merger, outside - first.with_biases(linears))
        before = {chain.measure(-1, outside & linears) for chain in chains.values()}
        _put(chains, merger, first.with_biases(set().union(*before)))
        for block, own in enumerate(inside):
            for chain in chains.values():
                chain.measure(block, own & linears)
            _put(chains, merger, own)
            for name, chain in chains.items():
                chain.advance(block)
                tell(len(examples[name]) * (block + 1) // first.length - len(examples[name]) * block // first.length)
        for chain in chains.values():
            chain.measure(first.length, (outside & linears).difference(*before))
        return {name: chain.found() for name, chain in chains.items()}


def _put(chains: "Mapping[str, _Chain]", merger: Merger, names: Iterable[str]) -> None:
    """Merge tensors, and set them in all networks."""
    for name in sorted(names):
        found = {model: gram for model, chain in chains.items() if (gram := chain.gram(name)) is not None}
        merged = merger.merged(name, found)
        for chain in chains.values():
            if merged is not None and chain.network.shapes.get(name) == tuple(merged.shape):
                chain.network.put({name: merged})


@dataclass
class _Chain:
    """A network that is run block by block, each batch from what the block before has made of it."""

    network: "RunningNetwork"
    batches: "list[list[Example]]"
    blocks: "list[nn.Module]" = field(init=False)
    linears: "dict[str, nn.Module]" = field(init=False)
    _sums: InputSums = field(init=False)
    _made: list[Any] = field(default_factory=list)
    """Of every batch, what the last merged block makes."""
    _seen: "dict[str, Tensor]" = field(default_factory=dict)
    _shared: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from mergetool.networks.ways import blocks_of

        self.blocks = blocks_of(self.network.model)
        self.linears = self.network.linears()

    @property
    def length(self) -> int:
        return len(self.blocks)

    def names_of(self, block: int) -> Iterator[str]:
        """What the checkpoint calls the tensors of a block."""
        prefix = next(name for name, each in self.network.model.named_modules() if each is self.blocks[block])
        for name, stored in self.network.places.names.items():
            if name.startswith(f"{prefix}."):
                yield stored
        for name, parts in self.network.places.fragments.items():
            if name.startswith(f"{prefix}."):
                yield from (part.name for part in parts)

    def with_biases(self, linears: Collection[str]) -> set[str]:
        """The weights of linear layers, and what their biases are called."""
        modules = {id(self.linears[name]) for name in linears if name in self.linears}
        paths = {path for path, module in self.network.model.named_modules() if id(module) in modules}
        return {stored for name, stored in self.network.places.names.items() if name.rpartition(".")[0] in paths}

    def gram(self, name: str) -> "Tensor | None":
        """What was measured of a layer."""
        return self._seen.get(self._shared.get(name, name))

    def measure(self, block: int, names: Iterable[str]) -> frozenset[str]:
        """Sum up what goes into layers while a block runs (-1: before the first); those that something went into."""
        wanted = {name: self.linears[name] for name in sorted(names) if name in self.linears}
        if not wanted:
            return frozenset()
        sums = InputSums(self.network.where)
        order = {name: module for name, module in self.linears.items() if name in wanted}
        with sums.watching(order):
            for place, batch in enumerate(self.batches):
                sums.batch = batch
                self._run(place, block)
        heard = frozenset(name for name in order if sums.has(name))
        found = sums.found(
            {name: order[name] for name in order if name in heard or block >= 0}, self.network.model.dtype
        )
        self._seen |= found.tensors
        self._shared |= found.shared
        return heard

    def advance(self, block: int) -> None:
        """Run a block that is merged now, and keep what it makes."""
        self._made = [self._run(place, block) for place in range(len(self.batches))]

    def found(self) -> Found:
        """All that was measured."""
        return Found(self._seen, self._shared)

    def _run(self, place: int, block: int) -> Any:
        """Run a batch up to the end of a block, from what the one before has made of it; what comes out."""
        import torch

        made: list[Any] = []
        with torch.no_grad(), self._skipping(place, block), self._stopping(block, made), suppress(_EnoughError):
            self.network.model(**tensor_of(self.batches[place], self.network.device))
        return made[0] if made else None

    @contextmanager
    def _skipping(self, place: int, block: int) -> Iterator[None]:
        """While inside, blocks before this one make at once what the last of them has made before."""
        calls = [0] * self.length

        def ready(number: int) -> Any:
            def forward(*_: Any, **__: Any) -> Any:
                calls[number] += 1
                return self._made[place]

            return forward

        skipped = self.blocks[: max(0, block)]
        for number, each in enumerate(skipped):
            each.forward = ready(number)
        try:
            yield
        finally:
            for each in skipped:
                del each.forward
        if any(count != 1 for count in calls[: len(skipped)]):
            what = "runs its blocks in another order than one after the other"
            raise PlanError(what, self.network.where, "write method: regmean")

    @contextmanager
    def _stopping(self, block: int, made: list[Any]) -> Iterator[None]:
        """While inside, the network runs no further than this block, whose output is added to `made`."""

        def before(*_: Any) -> None:
            raise _EnoughError

        def after(_: Any, __: Any, output: Any) -> None:
            made.append(output)
            raise _EnoughError

        hooks = []
        if block < 0 and self.blocks:
            hooks.append(self.blocks[0].register_forward_pre_hook(before))
        elif 0 <= block < self.length:
            hooks.append(self.blocks[block].register_forward_hook(after))
        try:
            yield
        finally:
            for each in hooks:
                each.remove()
