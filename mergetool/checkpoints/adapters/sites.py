"""What an adapter holds, by itself: every change at its place in the network that PEFT trained, without the network.

Names are those that the network has in memory, since nothing else is known: MODULE.weight for what hangs at a module.
Shapes are PEFT's own, outputs first, whichever way round the network stores the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from mergetool.checkpoints.adapters.changes import Added, Block, Change, LowRank
from mergetool.checkpoints.adapters.keys import (
    WRAPPED,
    Key,
    Part,
    attention_around,
    by_site,
    factors_at,
    read_keys,
    unwrapped,
)
from mergetool.checkpoints.adapters.places import leaf_of
from mergetool.checkpoints.adapters.settings import Settings
from mergetool.errors import SourceError
from mergetool.tensors.header import TensorSpec

_IN_PROJECTION = "in_proj_weight"
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
"""The order in which transformers' layers of experts have their parameters."""
_AGAIN = "save the adapter again"


class SiteKind(StrEnum):
    """What lies at a site. The first four are products of two factors."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV = "conv"
    PARAMETER = "parameter"
    """A parameter that was a target itself; mostly all experts of a layer."""
    ADDED = "added"
    """What is added to a bias."""
    BIAS = "bias"
    """A bias in full."""
    WHOLE = "whole"
    """Any other tensor in full (`modules_to_save`, embeddings of another size)."""
    MAGNITUDE = "magnitude"
    """DoRA's lengths of the rows of W + s B A."""


@dataclass(frozen=True)
class Site:
    """One tensor that an adapter changes or replaces."""

    name: str
    kind: SiteKind
    module: str
    """The module in memory; `name` is a parameter of it."""
    hung: str
    """The module with PEFT's wrappers around it, as in the names of the adapter's tensors."""
    own: tuple[str, ...]
    """The adapter's tensors: A and B of a product, the bias and what is added to it, or one."""
    shape: tuple[int, ...]
    """Of a product: (outputs, inputs), of an embedding (dimensions, tokens), of a convolution its own four axes or so,
    of experts (experts, outputs, inputs)."""
    rank: int = 0
    factor: float = 1.0
    """What B A is multiplied by, or what is added to a bias."""
    experts: int = 1
    times: int = 1
    """How often PEFT adds it, which `factor` holds: twice for MultiheadAttention's out_proj."""

    @property
    def is_product(self) -> bool:
        return self.rank > 0

    @property
    def is_full(self) -> bool:
        """Whether it is a value, not a change of one."""
        return self.kind in (SiteKind.BIAS, SiteKind.WHOLE, SiteKind.MAGNITUDE)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution: its axes after outputs and inputs."""
        return self.shape[2:] if self.kind is SiteKind.CONV else ()

    @property
    def change(self) -> Change:
        """The same as numbers are made from. A product has no origin: there is no W."""
        if self.is_product:
            block = Block(self.experts) if self.experts > 1 else None
            a, b = self.own
            return Change(self.name, self.shape, "", terms=(LowRank(a, b, self.factor, block=block),))
        if self.kind is SiteKind.ADDED:
            return Change(self.name, self.shape, "", terms=(Added(self.own[0], self.factor),))
        terms = tuple(Added(own, self.factor) for own in self.own[1:])
        return Change(self.name, self.shape, self.own[0], is_own=True, terms=terms)


class Sites:
    """Reads all sites of an adapter from its header and its settings. Raises SourceError for what has no meaning."""

    def __init__(self, own: Mapping[str, TensorSpec], settings: Settings) -> None:
        self._own = own
        self._settings = settings
        self._where = str(settings.folder)
        self.found: dict[str, Site] = {}
        self.warnings: list[str] = []
        self.tokens: list[str] = []
        """Embeddings of which single rows were trained."""
        keys = read_keys(own, self._where)
        self._hung = by_site(keys)
        self._wrappers: dict[str, list[str]] = {}
        for hung in sorted(self._hung, key=len, reverse=True):  # from the innermost on
            self._wrappers.setdefault(unwrapped(hung), []).append(hung)
        for hung, parts in self._hung.items():
            self._add(hung, parts)
        for key in keys:
            if key.part is Part.WHOLE:
                self._add_whole(key)
        if not self.found and not self.tokens:
            raise SourceError("the adapter changes nothing", self._where, "name a folder that peft saved an adapter to")

    # ------------------------------------------------------------------ what hangs at a module

    def _add(self, hung: str, parts: Mapping[Part, str]) -> None:
        module = unwrapped(hung)
        if Part.TOKENS in parts:
            self._settings.tokens(module)
            self.tokens.append(module)
        if not parts.keys() - {Part.TOKENS}:
            return
        a, b, embedding = factors_at(parts, self._own, self._where, _AGAIN)
        if not (a.dtype.is_float and b.dtype.is_float):
            what = f"A is {a.dtype.name}, B is {b.dtype.name}; both must be floating point"
            raise SourceError(what, f"{self._where}: {a.name}", _AGAIN)
        self._put(self._product(hung, a, b, embedding=embedding))
        if Part.BIAS in parts:
            spec, factor = self._own[parts[Part.BIAS]], self._settings.factor(module, a.shape[0])
            self._check_length(spec, b.shape[0])
            self._put(Site(f"{module}.bias", SiteKind.ADDED, module, hung, (spec.name,), spec.shape, factor=factor))
        self._add_magnitude(hung, parts, b.shape[0])

    def _product(self, hung: str, a: TensorSpec, b: TensorSpec, *, embedding: bool) -> Site:
        module = unwrapped(hung)
        name, own, rank = f"{module}.weight", (a.name, b.name), a.shape[0]
        around = attention_around(hung, self._hung)
        if embedding:
            factor = self._settings.factor(module, rank)
            return Site(name, SiteKind.EMBEDDING, module, hung, own, (b.shape[0], a.shape[1]), rank, factor)
        if len(a.shape) > 2:
            return self._convolution(hung, a, b)
        if f"{hung}.base_layer.out_proj" in self._hung:
            name = f"{module}.{_IN_PROJECTION}"
        elif (leaf := self._parameter(hung)) is not None:
            return self._experts(hung, leaf, a, b)
        times = 1 if around is None else 2
        factor = times * self._settings.factor(around or module, rank)
        return Site(name, SiteKind.LINEAR, module, hung, own, (b.shape[0], a.shape[1]), rank, factor, times=times)

    def _convolution(self, hung: str, a: TensorSpec, b: TensorSpec) -> Site:
        if any(size != 1 for size in b.shape[2:]):
            what = f"A is {list(a.shape)}, B is {list(b.shape)}: B A is no matrix"
            raise SourceError(what, f"{self._where}: {a.name}", _AGAIN)
        module, shape = unwrapped(hung), (b.shape[0], *a.shape[1:])
        factor = self._settings.factor(module, a.shape[0])
        return Site(f"{module}.weight", SiteKind.CONV, module, hung, (a.name, b.name), shape, a.shape[0], factor)

    def _experts(self, hung: str, leaf: str, a: TensorSpec, b: TensorSpec) -> Site:
        module = unwrapped(hung)
        name = f"{module}.{leaf}"
        rank = self._settings.rank(name) or a.shape[0]
        if a.shape[0] % rank:
            raise SourceError(f"{a.shape[0]} is no multiple of the rank, {rank}", f"{self._where}: {a.name}", _AGAIN)
        count, factor = a.shape[0] // rank, self._settings.factor(name, rank)
        shape = (count, b.shape[0], a.shape[1]) if count > 1 else (b.shape[0], a.shape[1])
        return Site(name, SiteKind.PARAMETER, module, hung, (a.name, b.name), shape, rank, factor, count)

    def _parameter(self, hung: str) -> str | None:
        """The parameter of its module that hangs here, where parameters were targets themselves.

        PEFT wraps a module once for each of its parameters, in the order in which the module has them.
        """
        module, named = unwrapped(hung), self._settings.parameters()
        wrappers = self._wrappers[module]
        leaves = {leaf for leaf in named if self._settings.targets(f"{module}.{leaf}")}
        if not leaves and len(wrappers) == 1 and leaf_of(module) != "experts":
            return None
        if not leaves and len(wrappers) == 2:
            leaves = {"gate_up_proj", "down_proj"}
        if len(leaves) == len(wrappers) and (len(leaves) == 1 or leaves <= set(_ORDER)):
            return sorted(leaves, key=(*_ORDER, *leaves).index)[wrappers.index(hung)]
        what = f"nothing tells which parameters of {module} its {len(wrappers)} products belong to"
        fix = f"apply it to its model, whose shapes tell: {{source: MODEL, adapters: [{self._settings.folder}]}}"
        raise SourceError(what, f"{self._where}: {hung}", fix)

    def _add_magnitude(self, hung: str, parts: Mapping[Part, str], outputs: int) -> None:
        uses, own = self._settings.fields.get("use_dora") is True, parts.get(Part.MAGNITUDE)
        if uses != (own is not None):
            what = f"use_dora is {uses}, but there is {'a' if own else 'no'} magnitude for {hung}"
            raise SourceError(what, self._settings.where, _AGAIN)
        if own is not None:
            module, shape = unwrapped(hung), self._own[own].shape
            self._check_length(self._own[own], outputs)
            self._put(Site(f"{module}.{Part.MAGNITUDE}", SiteKind.MAGNITUDE, module, hung, (own,), shape))

    def _check_length(self, spec: TensorSpec, outputs: int) -> None:
        """One number for every output."""
        if spec.num_elements != outputs or not spec.dtype.is_float:
            what = f"it is {list(spec.shape)} ({spec.dtype.name}) for {outputs} outputs"
            raise SourceError(what, f"{self._where}: {spec.name}", _AGAIN)

    # ------------------------------------------------------------------ whole tensors

    def _add_whole(self, key: Key) -> None:
        module, _, leaf = key.module.rpartition(".")
        saved = self._settings.saves(module)
        kind = SiteKind.BIAS if "bias" in leaf and not saved else SiteKind.WHOLE
        site = Site(key.module, kind, module, key.site.rpartition(".")[0], (key.own,), self._own[key.own].shape)
        other = self.found.get(site.name)
        if other is not None and other.kind is SiteKind.ADDED and other.shape == site.shape:
            both = (*site.own, *other.own)
            self.found[site.name] = Site(
                site.name, SiteKind.BIAS, module, site.hung, both, site.shape, factor=other.factor
            )
        elif other is not None and other.is_product and ".base_layer." in key.own:
            self.warnings.append(
                f"{site.name} is held in full, too, as it was before training: taken to be the base's, and left out"
            )
        else:
            self._put(site)

    def _put(self, site: Site) -> None:
        other = self.found.get(site.name)
        if other is not None:
            what = f"{site.name} is brought twice, as {other.own[0]} too"
            raise SourceError(what, f"{self._where}: {site.own[0]}", _AGAIN)
        self.found[site.name] = site


def hung_together(sites: Mapping[str, Site]) -> dict[str, Site]:
    """Sites of several adapters, as one has them.

    PEFT wraps a module once for each parameter, the last one outermost; biases lie in what is wrapped.
    Raises SourceError where nothing tells the order of the parameters.
    """
    several: dict[str, list[Site]] = {}
    for site in sites.values():
        if site.kind is SiteKind.PARAMETER:
            several.setdefault(site.module, []).append(site)
    hung: dict[str, str] = {}
    for module, parameters in several.items():
        leaves = [leaf_of(site.name) for site in parameters]
        if len(leaves) > 1 and not set(leaves) <= set(_ORDER):
            what = f"nothing tells in which order {module} has its parameters {', '.join(leaves)}"
            raise SourceError(what, module, "add base: MODEL and output: {kind: checkpoint}")
        outermost = sorted(parameters, key=lambda site: (*_ORDER, *leaves).index(leaf_of(site.name)), reverse=True)
        hung |= {site.name: module + WRAPPED * depth for depth, site in enumerate(outermost)}
    together = {name: replace(site, hung=hung.get(name, site.hung)) for name, site in sites.items()}
    inner = {site.module: site.hung for site in sorted(together.values(), key=_depth) if site.is_product}
    biases = {name: site for name, site in together.items() if site.kind is SiteKind.BIAS and site.module in inner}
    return together | {name: replace(site, hung=inner[site.module] + WRAPPED) for name, site in biases.items()}


def _depth(site: Site) -> int:
    return len(site.hung)
