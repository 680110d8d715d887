"""REPAIR: give the merged network the activations that its parents had.

Averages of aligned networks are right in what they look for, but their activations are too quiet: where neurons agree
only partly, their differences cancel, and the variance that is lost grows from layer to layer. Two cures:

    bn-stats   batch norm layers measure mean and variance of their inputs anew. Enough for networks with batch norm.
    full       also every linear or convolutional layer whose outputs may be permuted: scale (and shift, where it has a
               bias) each output channel so that its mean and standard deviation are the parents' average.

One pass over some data, without labels, is all it takes. While it is measured, a layer's output is corrected at once,
so that the layers behind it already see corrected inputs; in the end the corrections are folded into the weights.

Reference: Jordan et al., REPAIR, ICLR 2023, https://arxiv.org/abs/2211.08403, section 3.
Differs from the paper: any number of parents; corrections are folded into existing weights, so a layer without a bias
is scaled but not shifted, and no layer is added (on identity shortcuts neither); all linear layers, not only
convolutions; channels that are constant are left alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Weights = Mapping[str, Tensor]
Batch = Mapping[str, Tensor] | Tensor

CONSTANT = 1e-6  # a channel with a smaller standard deviation says nothing


@dataclass
class _Moments:
    """Mean and variance per channel, added up batch by batch in float64."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # of any device
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, by_channel: Tensor) -> None:
        """`by_channel`: (channels, everything else)."""
        values = by_channel.double()
        self.count += values.shape[1]
        self.total = self.total + values.sum(dim=1)
        self.squares = self.squares + values.square().sum(dim=1)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Repaired:
    """Tensors to replace, and for each corrected layer the mean over channels of its std over the parents'."""

    tensors: dict[str, Tensor]
    ratios: dict[str, float]


def try_out(network: nn.Module, weights: Weights, batch: Batch, *, statistics: bool) -> None:
    """Run two rows, to see that weights, network and data fit each other. Raises what torch raises, or ValueError.

    `statistics`: also that there are batch norm statistics to measure.
    """
    load(network, weights)
    if statistics:
        _check_norms(network)
    with torch.no_grad():
        run(network, {key: x[:2] for key, x in batch.items()} if isinstance(batch, Mapping) else batch[:2])


def reset_statistics(network: nn.Module, merged: Weights, batches: Sequence[Batch]) -> Repaired:
    """Measure all batch norm statistics of the merged network anew. Raises ValueError if it has no batch norm."""
    load(network, merged)
    _check_norms(network)
    with _measuring(network), torch.no_grad():
        for batch in batches:
            run(network, batch)
    return Repaired(_statistics(network), {})


def repair(
    network: nn.Module, merged: Weights, parents: Sequence[Weights], *, layers: Sequence[str], batches: Sequence[Batch]
) -> Repaired:
    """Correct the output channels of `layers` (names of modules with a weight), and all batch norm statistics.

    `parents` are the aligned models. The network is left with other weights than before.
    """
    goals = _goals(network, parents, layers, batches)
    load(network, merged)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    with _measuring(network), torch.no_grad(), _hooked(network, layers, _corrector(goals, seen)):
        for batch in batches:
            run(network, batch)
    tensors, ratios = _statistics(network), {}
    for name, (mean, std) in goals.items():
        mean_seen = torch.stack([m for m, _ in seen[name]]).mean(dim=0)
        std_seen = torch.stack([v for _, v in seen[name]]).mean(dim=0).sqrt()
        alive = (std > CONSTANT) & (std_seen > CONSTANT)
        scale = torch.where(alive, std / std_seen.clamp_min(CONSTANT), 1.0)
        shift = torch.where(alive, mean - scale * mean_seen, 0.0)
        tensors |= _folded(network, name, scale, shift)
        ratios[name] = float((std_seen[alive] / std[alive]).mean()) if bool(alive.any()) else 1.0
    return Repaired(tensors, ratios)


def correctable(network: nn.Module) -> dict[str, tuple[str, int]]:
    """Layers that can be corrected: name -> (name of their weight, its axis of output channels)."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        name: (f"{name}.weight", _out_axis(module))
        for name, module in network.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"  # of transformers: a linear layer, (in, out)
    }


def _goals(
    network: nn.Module, parents: Sequence[Weights], layers: Sequence[str], batches: Sequence[Batch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation per channel of each layer's outputs, averaged over the parents."""
    collected: dict[str, list[_Moments]] = {name: [] for name in layers}
    for parent in parents:
        load(network, parent)
        moments = {name: _Moments() for name in layers}
        with torch.no_grad(), _hooked(network, layers, _observer(moments)):
            for batch in batches:
                run(network, batch)
        for name in layers:
            if moments[name].count:
                collected[name].append(moments[name])
    return {
        name: (
            torch.stack([one.mean for one in all_moments]).mean(dim=0),
            torch.stack([one.std for one in all_moments]).mean(dim=0),
        )
        for name, all_moments in collected.items()
        if all_moments
    }


Hook = Callable[[str, nn.Module, Tensor], Tensor]


def _observer(moments: Mapping[str, _Moments]) -> Hook:
    def hook(name: str, module: nn.Module, output: Tensor) -> Tensor:
        moments[name].add(_by_channel(module, output))
        return output

    return hook


def _corrector(goals: Mapping[str, tuple[Tensor, Tensor]], seen: Mapping[str, list[tuple[Tensor, Tensor]]]) -> Hook:
    """Bring every batch of outputs to the goal (as far as the layer's weights could), and note what it was before."""

    def hook(name: str, module: nn.Module, output: Tensor) -> Tensor:
        values = _by_channel(module, output).double()
        mean, variance = values.mean(dim=1), values.var(dim=1, correction=0)
        seen[name].append((mean, variance))
        goal_mean, goal_std = goals[name]
        alive = (goal_std > CONSTANT) & (variance.sqrt() > CONSTANT)
        scale = torch.where(alive, goal_std / variance.sqrt().clamp_min(CONSTANT), 1.0)
        shift = torch.where(alive, goal_mean - scale * mean, 0.0)
        if getattr(module, "bias", None) is None:
            shift = torch.zeros_like(shift)
        return output * _along(scale, module, output) + _along(shift, module, output)

    return hook


@contextmanager
def _hooked(network: nn.Module, layers: Sequence[str], hook: Hook) -> Iterator[None]:
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda module, _, output, name=name: hook(name, module, output)
        )
        for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _measuring(network: nn.Module) -> Iterator[None]:
    """Batch norm layers use and average the statistics of their batches; all else is as in evaluation."""
    network.eval()
    before = [norm.momentum for norm in _norms(network)]
    for norm in _norms(network):
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(_norms(network), before, strict=True):
            norm.momentum = momentum
        network.eval()


def _check_norms(network: nn.Module) -> None:
    if not _norms(network):
        raise ValueError("the network has no batch norm, so there are no statistics to measure")


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all batch norm layers."""
    return {
        f"{name}.{key}": getattr(module, key).clone()
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        for key in ("running_mean", "running_var")
    }


def load(network: nn.Module, weights: Weights) -> None:
    """Put weights into the network (counters and the like stay), and the network in evaluation mode."""
    own = network.state_dict(keep_vars=True)
    given = {id(x) for name, x in own.items() if name in weights}  # tied tensors have several names
    missing = sorted(name for name, x in own.items() if x.is_floating_point() and id(x) not in given)
    if missing:
        raise ValueError(f"the network has {missing[0]!r}, which the models lack")
    network.load_state_dict({name: weights.get(name, x) for name, x in own.items()})
    network.eval()


def each_on(device: torch.device, batch: Batch) -> Batch:
    """A batch on a device."""
    return {key: x.to(device) for key, x in batch.items()} if isinstance(batch, Mapping) else batch.to(device)


def run(network: nn.Module, batch: Batch) -> None:
    """Let a batch go through a network."""
    network(**batch) if isinstance(batch, Mapping) else network(batch)


def _folded(network: nn.Module, name: str, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Weight and bias of a layer with its correction."""
    module = network.get_submodule(name)
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    shape = [-1 if axis == _out_axis(module) else 1 for axis in range(weight.ndim)]
    tensors = {f"{name}.weight": (weight * scale.reshape(shape)).to(weight.dtype)}
    if bias is not None:
        tensors[f"{name}.bias"] = (bias.detach() * scale + shift).to(bias.dtype)
    return tensors


def _out_axis(module: nn.Module) -> int:
    return 1 if type(module).__name__ == "Conv1D" else 0


def channel_axis(module: nn.Module) -> int:
    """The axis of the channels in a layer's output."""
    return 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1


def _by_channel(module: nn.Module, output: Tensor) -> Tensor:
    return output.movedim(channel_axis(module), 0).flatten(start_dim=1)


def _along(values: Tensor, module: nn.Module, output: Tensor) -> Tensor:
    """`values`, one per channel, in a shape that broadcasts over `output`."""
    shape = [1] * output.ndim
    shape[channel_axis(module)] = -1
    return values.reshape(shape).to(output)
