"""What the units of networks say to the same inputs, in the place of weights, for all that matches tensors.

A layer's input is laid out over spaces like the axis of the weight that reads it. So a table of what went into a layer,
a row for each position of each input, is one more tensor of the model of which one axis moves: the inner products of
two models' tables are all that matching by activations asks for (Git Re-Basin, section 3.1). Units that no layer reads
(queries, keys) are seen where they are written.

Every model sees the same inputs, one model after the other, and of the positions that there are the same few thousand
are kept, so that the tables stay small whatever the data.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergetool.alignment.network import Network, ParentWeights, build, data_that_fit, read_batches
from mergetool.alignment.repair import Batch, channel_axis, correctable, each_on, load, run
from mergetool.arch.spec import ArchSpec
from mergetool.errors import MergeError, PlanError
from mergetool.kernels.spaces import Factor, Layout, length

if TYPE_CHECKING:
    from mergetool.alignment.models import Models
    from mergetool.alignment.options import MatchBy

POSITIONS = 4096
"""That are kept of every layout, from all layers that read it."""
SILENT = 1e-6
"""A unit whose standard deviation is below this share of the largest says nothing."""
_WHERE, _OTHERWISE = "merge.match", "match.by: weights"
Table = Mapping[str, Tensor]


@dataclass(frozen=True)
class SeenAt:
    """Where activations are seen: what goes into a layer, or comes out of it."""

    name: str
    path: str
    reads: bool
    layout: Layout


def said(
    match: "MatchBy", models: "Models", spec: ArchSpec, names: Sequence[str]
) -> tuple[Mapping[str, tuple[Layout, ...]], Sequence[Table]]:
    """Layouts of tables, and the tables of these models. Raises PlanError, SourceError or MergeError."""
    assert match.data is not None
    network = build(models, match.network, _WHERE)
    sites = sites_of(network, spec)
    network.module.to(models.device)
    batches = [each_on(models.device, batch) for batch in read_batches(models, match.data, network.module)]
    with data_that_fit(_WHERE, _OTHERWISE):
        tables = [_table(network, ParentWeights(models, None, network, name), sites, batches) for name in names]
    for name, table in zip(names, tables, strict=True):
        _check(table, sites, name)
    tables = [{name: _scaled(x, match.compare) for name, x in table.items()} for table in tables]
    rows = {name: len(x) for name, x in tables[0].items()}
    return {site.name: (((Factor(rows[site.name]),),), site.layout) for site in sites}, tables


def most_said(spec: ArchSpec) -> dict[str, tuple[Layout, ...]]:
    """Layouts of tables that are as large as they can get, before it is known which layers read what."""
    moving = [axis for axes in spec.layouts().values() if len(axes) > 1 for axis in axes if _spaces(spec, axis)]
    return {str(place): (((Factor(POSITIONS),),), layout) for place, layout in enumerate(dict.fromkeys(moving))}


def sites_of(network: Network, spec: ArchSpec) -> list[SeenAt]:
    """Where every space that can move is seen. Raises PlanError for one that is seen nowhere."""
    reading, writing = [], []
    for path, (weight, out) in correctable(network.module).items():
        axes = spec.tensors[network.names[weight]].axes if network.names.get(weight) in spec.tensors else ()
        if axes and getattr(network.module.get_submodule(path), "groups", 1) == 1:
            reading.append(SeenAt(f"into {path}", path, reads=True, layout=axes[1 - out]))
        if axes:
            writing.append(SeenAt(f"out of {path}", path, reads=False, layout=axes[out]))
    sites = [site for site in reading if _spaces(spec, site.layout)]
    seen = {space for site in sites for space in _spaces(spec, site.layout)}
    sites += [site for site in writing if _spaces(spec, site.layout) - seen]
    seen = {space for site in sites for space in _spaces(spec, site.layout)}
    moving = {space for axes in spec.layouts().values() for axis in axes for space in _spaces(spec, axis)}
    if hidden := sorted(moving - seen):
        what = f"no linear or convolutional layer reads or writes {hidden[0]}, so its activations cannot be seen"
        raise PlanError(what, _WHERE, f"set {_OTHERWISE}")
    return sites


def _spaces(spec: ArchSpec, layout: Layout) -> set[str]:
    """The spaces on an axis that can move."""
    named = {factor.space for segment in layout for factor in segment if factor.space is not None}
    return {name for name in named if spec.spaces[name].symmetry != "fixed"}


def _table(
    network: Network, weights: Mapping[str, Tensor], sites: Sequence[SeenAt], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """What one model says, at the same positions as any other."""
    load(network.module, weights)
    alike = {layout: sum(site.layout == layout for site in sites) for layout in {site.layout for site in sites}}
    kept = {site.name: ceil(POSITIONS / (alike[site.layout] * len(batches))) for site in sites}
    listener = _Listener(torch.Generator().manual_seed(0), kept)
    with torch.no_grad(), _heard(network.module, sites, listener.hear):
        for listener.batch in batches:
            run(network.module, listener.batch)
    return {site.name: torch.cat(found) for site in sites if (found := listener.rows.get(site.name))}


@dataclass
class _Listener:
    """Keeps some positions of what it hears."""

    draw: torch.Generator
    kept: Mapping[str, int]
    batch: Batch = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def hear(self, site: SeenAt, values: Tensor, axis: int) -> None:
        """A layer was given (or has made) these values, whose channels lie along `axis`."""
        rows = values.detach().movedim(axis, -1)
        mask = self.batch.get("attention_mask") if isinstance(self.batch, Mapping) else None
        rows = rows[mask.bool()] if mask is not None and mask.shape == rows.shape[:-1] else rows.flatten(0, -2)
        if len(rows) > self.kept[site.name]:
            chosen = torch.randperm(len(rows), generator=self.draw)[: self.kept[site.name]]
            rows = rows[chosen.to(rows.device)]
        self.rows.setdefault(site.name, []).append(rows.clone())  # a network may go on to change it in place


@contextmanager
def _heard(module: nn.Module, sites: Sequence[SeenAt], hear: Callable[[SeenAt, Tensor, int], None]) -> Iterator[None]:
    def hook(site: SeenAt) -> Any:
        if site.reads:
            return lambda layer, given: hear(site, given[0], channel_axis(layer))
        return lambda layer, _, made: hear(site, made, channel_axis(layer))

    handles = []
    for site in sites:
        layer = module.get_submodule(site.path)
        add = layer.register_forward_pre_hook if site.reads else layer.register_forward_hook
        handles.append(add(hook(site)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(table: Table, sites: Sequence[SeenAt], model: str) -> None:
    """Raise PlanError for a layer that nothing went through, MergeError for what is no number."""
    for site in sites:
        if site.name not in table:
            what = f"nothing went through {site.path} that could be seen"
            raise PlanError(what, _WHERE, f"set {_OTHERWISE}")
        found = table[site.name]
        if found.shape[-1] != length(site.layout):
            what = f"{site.path} is given {found.shape[-1]} channels, the architecture tells {length(site.layout)}"
            raise PlanError(what, _WHERE, f"set {_OTHERWISE}")
        if not bool(found.isfinite().all()):
            what = f"what goes {site.name} is not finite"
            raise MergeError(what, f"model {model!r}", "repair or replace that model, or leave out those inputs")


def _scaled(rows: Tensor, compare: str) -> Tensor:
    """A table whose inner products with another are correlations, or means of products."""
    if compare == "product":
        return rows / sqrt(len(rows))
    centred = rows - rows.mean(dim=0)
    norms: Tensor = centred.square().sum(dim=0).sqrt()
    return torch.where(norms > SILENT * norms.max(), centred / norms.clamp_min(1e-30), 0.0)
