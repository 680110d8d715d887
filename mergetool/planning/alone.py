"""Adapters by themselves, seen as models: all of them under the names of what any of them changes, on a base of zeros.

What an adapter adds to a weight is its task vector; the base's weights have no part in it, so that they are zeros here,
and so is what an adapter does not change. What adapters hold in full (heads, norms, biases) are values, not changes:
they are merged as task vectors where the recipe has a base, whose tensors are then read; without one they are copied
from the only adapter that has them.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.checkpoints.adapters.places import Places
from mergetool.checkpoints.adapters.sites import Site, SiteKind, hung_together
from mergetool.errors import PlanError
from mergetool.planning.graph import BASE
from mergetool.planning.parents import label, listed
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import DType
from mergetool.tensors.factors import Halves, nothing_added
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource


class Beneath(ModelSource):
    """What adapters are on top of: zeros under what they add to, and the base's own under what they hold in full."""

    def __init__(self, changes: Mapping[str, TensorSpec], base: ModelSource | None, own: Mapping[str, str]) -> None:
        self._base, self._own = base, own
        self.folder: Path | None = None if base is None else base.folder
        kept = {} if base is None else {name: base.specs[stored] for name, stored in own.items()}
        self.specs = {**changes, **{name: TensorSpec(name, spec.dtype, spec.shape) for name, spec in kept.items()}}
        self._order = {name: place for place, name in enumerate(self.specs)}

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return () if self._base is None or not self._own else self._base.files

    @property
    def tokenizer_folder(self) -> Path | None:
        return None

    def position(self, name: str) -> tuple[int, int]:
        if self._base is not None and name in self._own:
            return self._base.position(self._own[name])
        return 0, self._order[name]

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if self._base is not None and name in self._own:
            self._base.read_bytes(self._own[name], begin, buffer)
        else:
            buffer[:] = bytes(len(buffer))

    def num_directions(self, name: str) -> int | None:
        return 0

    def factors(self, name: str) -> Halves | None:
        return nothing_added(self.specs[name].shape)

    def close(self) -> None:
        if self._base is not None:
            self._base.close()


class OnTop(ModelSource):
    """One adapter; what it does not hold is what is beneath."""

    def __init__(self, adapter: AdapterAlone, beneath: Beneath) -> None:
        self._adapter, self._beneath = adapter, beneath
        self.folder: Path | None = adapter.folder
        self.specs = {**beneath.specs, **adapter.specs}

    @property
    def sites(self) -> Mapping[str, Site]:
        """What the adapter holds."""
        return self._adapter.sites

    @property
    def origin(self) -> ModelSource:
        return self._beneath

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._adapter.files

    @property
    def tokenizer_folder(self) -> Path | None:
        return None

    def stored_as(self, name: str) -> DType:
        return self._of(name).stored_as(name)

    def position(self, name: str) -> tuple[int, int]:
        return self._adapter.position(name) if name in self._adapter.specs else (0, 0)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        self._of(name).read_bytes(name, begin, buffer)

    def num_directions(self, name: str) -> int | None:
        site = self._adapter.sites.get(name)
        if site is None:
            return 0
        return site.rank if site.is_product else None

    def factors(self, name: str) -> Halves | None:
        if name not in self._adapter.sites:
            return self._beneath.factors(name)
        return self._adapter.factors(name) if self._adapter.sites[name].is_product else None

    def scale(self, name: str) -> float:
        return self._adapter.sites[name].factor if name in self._adapter.sites else 1.0

    def close(self) -> None:
        self._adapter.close()

    def _of(self, name: str) -> ModelSource:
        return self._adapter if name in self._adapter.specs else self._beneath


def as_models(recipe: Recipe, adapters: Mapping[str, AdapterAlone], base: ModelSource | None) -> dict[str, ModelSource]:
    """The adapters as models on one base. Raises PlanError where a tensor is a change here and a value there."""
    _check_kinds(adapters)
    sites = sites_of(adapters)
    changes = {name: _zeros(name, adapters) for name, site in sites.items() if not site.is_full}
    full = {name: site for name, site in sites.items() if site.is_full}
    own: dict[str, str] = {}
    if base is not None and full:
        places = Places(base.specs, read_config(base.folder), full)
        own = {name: stored for name, site in full.items() if (stored := _stored_as(places, site)) is not None}
    _check_values(recipe, adapters, [name for name in full if name not in own], has_base=base is not None)
    beneath = Beneath(changes, base, own)
    return {BASE: beneath, **{name: OnTop(adapter, beneath) for name, adapter in adapters.items()}}


def sites_of(adapters: Mapping[str, AdapterAlone]) -> dict[str, Site]:
    """Every tensor that any of the adapters changes, as the first one does, hung where one adapter of all has it."""
    sites: dict[str, Site] = {}
    for adapter in adapters.values():
        for name in sorted(adapter.sites, key=adapter.position):
            site = adapter.sites[name]
            if site.kind is SiteKind.WHOLE and name in sites:  # elsewhere by itself, it is part of a module here
                sites[name] = site
            sites.setdefault(name, site)
    return hung_together(sites)


def _zeros(name: str, adapters: Mapping[str, AdapterAlone]) -> TensorSpec:
    """A tensor beneath, stored as the widest of what is added to it."""
    having = [adapter for adapter in adapters.values() if name in adapter.specs]
    widest = max((adapter.stored_as(name) for adapter in having), key=lambda dtype: dtype.bits)
    return TensorSpec(name, widest, having[0].specs[name].shape)


def _stored_as(places: Places, site: Site) -> str | None:
    """The base's tensor that a value takes the place of; of an output layer that it ties, its input embeddings."""
    outer = site.name.replace(".decoder.", ".")  # a bias that a decoder shares with the head around it
    return places.counterpart(site.name) or places.shared(site.module, site.shape) or places.counterpart(outer)


def _check_kinds(adapters: Mapping[str, AdapterAlone]) -> None:
    seen: dict[str, str] = {}
    for model, adapter in adapters.items():
        for name, site in adapter.sites.items():
            first = seen.setdefault(name, model)
            other = adapters[first].sites[name]
            if (_sort(site), site.times) != (_sort(other), other.times):
                what = f"{label(first)} has it as {other.kind}, {label(model)} as {site.kind}"
                fix = "add base: MODEL and output: {kind: checkpoint}, or leave one of them out"
                raise PlanError(what, name, fix)
            if not site.is_full and site.shape != other.shape:
                what = f"{label(first)} changes {list(other.shape)}, {label(model)} {list(site.shape)}"
                raise PlanError(what, name, "leave one of them out: they were trained on two networks")


def _sort(site: Site) -> SiteKind:
    """Kinds that can be merged with each other."""
    return SiteKind.WHOLE if site.kind is SiteKind.BIAS else site.kind


def _check_values(recipe: Recipe, adapters: Mapping[str, AdapterAlone], names: list[str], *, has_base: bool) -> None:
    """Values cannot be added up like changes: without the base's, only one of them can be taken."""
    for name in names:
        having = [model for model, adapter in adapters.items() if name in adapter.sites]
        chosen = any(fnmatchcase(name, each.match) and each.use is not None for each in recipe.overrides)
        if len(having) > 1 and not chosen:
            what = f"{listed([label(model) for model in having])} hold it in full"
            lacks = "the base lacks it" if has_base else "without the base's nothing tells what they changed of it"
            fix = f"take one of them: overrides: [{{match: {name!r}, use: {having[0]}}}]"
            raise PlanError(
                f"{what}, and {lacks}",
                name,
                fix if has_base else f"add base: MODEL and output: {{kind: adapter}}, or {fix}",
            )
