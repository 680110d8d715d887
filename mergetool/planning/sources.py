"""Where the models of a recipe lie: a folder or file here, or a repository on the Hub.

What is there as a path is meant as a path; else `org/name` and `org/name@revision` are looked up on the Hub, once for
each plan. A plan needs headers only, which are read from a distance; a run fetches the files and plans again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergetool.bundle import is_bundle
from mergetool.checkpoints.adapters import AdapterAlone, AdapterSource
from mergetool.checkpoints.adapters.places import plain
from mergetool.checkpoints.codes import describes_codes
from mergetool.checkpoints.quantised import plain_numbers
from mergetool.errors import HubError, PlanError, SourceError
from mergetool.recipe.schema import ModelReference, Recipe, expanded
from mergetool.recipe.words import UNION
from mergetool.tensors.folder import open_model
from mergetool.tensors.hub import HubName, Repository, find, hub_name
from mergetool.tensors.side_files import licence_of
from mergetool.tensors.source import ModelSource, OpenFile
from mergetool.units import filesize


@dataclass(frozen=True)
class Provenance:
    """Where a model or an adapter came from."""

    reference: str
    """As the recipe says it."""
    licence: str | None = None
    """What its model card claims."""
    repo: str | None = None
    commit: str | None = None
    """Of a repository on the Hub."""


@dataclass(frozen=True)
class Place:
    """A reference that was looked up."""

    path: Path
    origin: Provenance
    elsewhere: Mapping[Path, OpenFile] = field(default_factory=dict)
    """Headers of files that are not here yet."""


class Lookup:
    """Looks references up. Paths are relative to `folder`. With `as_stored`, quantised weights stay codes."""

    def __init__(
        self, folder: Path, repositories: dict[tuple[str, bool], Repository] | None = None, *, as_stored: bool = False
    ) -> None:
        self._folder = folder
        self._as_stored = as_stored
        self._repositories = {} if repositories is None else repositories
        self._only_named: set[tuple[str, bool]] = set()
        self._trained_on: dict[str, str] = {}
        self._called: dict[str, dict[str, str]] = {}
        """What adapters by themselves call their tensors: plain name -> name."""
        self.warnings: list[str] = []
        self.pins: dict[str, str] = {}
        self.origins: dict[str, tuple[Provenance, ...]] = {}
        """Of every model that was opened, by name: the model itself, then its adapters."""

    def inside(self, folder: Path) -> "Lookup":
        """What looks up for a recipe inside this one; what is missing is known here, too."""
        return Lookup(folder, self._repositories)

    def open(self, name: str, source: str, adapters: tuple[str, ...] = (), select: str | None = None) -> ModelSource:
        """Open a model with its adapters, or one expert of a bundle. Raises SourceError or HubError."""
        place = self._place(source, whole=select is not None)
        model = _open(place, select)
        return self.adapted(name, model if self._as_stored else plain_numbers(model), adapters, place.origin)

    def adapted(
        self, name: str, model: ModelSource, adapters: tuple[str, ...], origin: Provenance | None = None
    ) -> ModelSource:
        """A model with its adapters. `origin`: where it came from, if from anywhere."""
        origins = [] if origin is None else [origin]
        for adapter in adapters:
            added = self._place(adapter, adapter=True)
            model = AdapterSource(model, added.path, added.elsewhere)
            self.warnings += [f"{name}: {text}" for text in model.warnings]
            others = [] if origin is None else _made_for_another(origin, model.folder, model.made_for)
            self.warnings += [f"{name}: {text}" for text in others]
            origins.append(added.origin)
        self.origins[name] = tuple(origins)
        self._warn(f"{name}: {remark}" for remark in model.remarks)
        return model

    def open_adapter(self, name: str, adapter: str, base: ModelSource | None = None) -> AdapterAlone:
        """Open an adapter by itself; it must fit the base, if there is one. Raises SourceError or HubError."""
        place = self._place(adapter, adapter=True)
        source = AdapterAlone(place.path, place.elsewhere)
        warnings = source.warnings
        if base is not None:
            warnings = (*warnings, *AdapterSource(base, place.path, place.elsewhere).warnings)
            for origin in self.origins["base"][:1]:  # none where a recipe makes it
                warnings = (*warnings, *_made_for_another(origin, base.folder, source.made_for))
        self._warn(f"{name}: {text}" for text in warnings)
        self._compare_bases(name, source.made_for)
        self._compare_names(name, source)
        self.origins[name] = (place.origin,)
        return source

    def _compare_bases(self, name: str, made_for: str | None) -> None:
        """A warning where adapters that are merged with each other were trained on two repositories."""
        if (trained := hub_name(made_for or "")) is None:
            return
        self._trained_on[name] = trained.repo
        first, repo = next(iter(self._trained_on.items()))
        if repo.lower() != trained.repo.lower():
            self._warn([f"{name} was trained on {trained.repo}, {first} on {repo}: are they of one model?"])

    def _warn(self, texts: Iterable[str]) -> None:
        """Say what was not said before, as when a plan is made again."""
        self.warnings += [text for text in dict.fromkeys(texts) if text not in self.warnings]

    def _compare_names(self, name: str, source: AdapterAlone) -> None:
        """Raises PlanError where adapters call one layer by two names: they are of two classes of one network."""
        called = {plain(site): site for site in source.sites}
        for other, names in self._called.items():
            for here, there in (*_alike(called, names), *((there, here) for here, there in _alike(names, called))):
                if here != there:
                    what = f"it is {here!r} in {name}, {there!r} in {other}"
                    fix = "name base: MODEL, and each as {source: MODEL, adapters: [ADAPTER]}: the model's names tell"
                    raise PlanError(f"{what}: one tensor by two names", name, fix)
        self._called[name] = called

    def folder(self, text: str) -> Path:
        """The folder of a tokenizer's files. Raises SourceError or HubError."""
        return self._place(text).path

    def _place(self, text: str, *, adapter: bool = False, whole: bool = False) -> Place:
        path = (self._folder / expanded(text)).absolute()
        name = self._hub_name(text) if is_on_hub(self._folder, text) else None
        if name is None:
            return Place(path, Provenance(text, licence_of(path if path.is_dir() else path.parent)))
        repository = self._repository(name, text, adapter=adapter)
        origin = Provenance(text, licence_of(repository.folder), repository.name, repository.commit)
        headers = {} if whole or _is_pickled(repository) else repository.headers()
        if whole or _is_pickled(repository) or _needs_values(headers):  # no header tells what is in it
            return Place(repository.fetch(whole=whole), origin)
        return Place(repository.folder, origin, headers)

    def _hub_name(self, text: str) -> HubName | None:
        """The Hub id that is meant, unless it looks more like a mistyped path."""
        name = hub_name(text)
        if name is None or text.startswith("hf://") or name.revision is not None:
            return name
        if (self._folder / name.repo).parent.is_dir():
            what = "no such file or folder"
            fix = f"check the path; if the model on the Hub is meant, write hf://{text}"
            raise SourceError(what, str((self._folder / name.repo).absolute()), fix)
        return name

    def _repository(self, name: HubName, text: str, *, adapter: bool) -> Repository:
        key = (str(name), adapter)
        if key not in self._repositories:
            try:
                repository = find(name, adapter=adapter)
            except HubError as error:
                if not text.startswith("hf://"):
                    place = (self._folder / text).absolute()
                    error.what = f"there is no folder {place}; and as a model on the Hub: {error.what}"
                    error.fix = f"check the path: a folder of this name would have to be {place}; else {error.fix}"
                raise
            self._repositories[key] = repository
            if repository.name != name.repo:
                self.warnings.append(f"{name.repo} is called {repository.name} now: write that")
        return self._repositories[key]

    def pin(self, text: str, *, adapter: bool) -> str:
        """A reference that will mean the same tomorrow: a repository at its commit, a path as it is."""
        name = self._hub_name(text) if is_on_hub(self._folder, text) else None
        if name is None:
            return text
        repository = self._repository(name, text, adapter=adapter)
        self.pins[text] = f"{repository.name}@{repository.commit}"
        return self.pins[text]

    def only_named(self, text: str) -> None:
        """Fetch no weights of a model: adapters by themselves read no more of their base than headers."""
        if (name := hub_name(text)) is not None:
            self._only_named.add((str(name), False))

    @property
    def missing(self) -> dict[str, int]:
        """Files that are still to be fetched, with their sizes."""
        return {f"{repository}/{name}": size for repository in self._read for name, size in repository.missing.items()}

    @property
    def _read(self) -> list[Repository]:
        return [repository for key, repository in self._repositories.items() if key not in self._only_named]

    def fetch(self, say: Callable[[str], None]) -> None:
        """Download what is missing. Raises HubError or OutputError."""
        for repository in self._read:
            if missing := repository.missing:
                say(f"fetching {repository}: {len(missing)} files, {filesize(sum(missing.values()))}")
                repository.fetch()


def _alike(called: Mapping[str, str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs of names for one tensor: a model inside one with a head is a part of it (`bert.encoder`, `encoder`)."""
    for each, own in called.items():
        for known in (each, each.partition(".")[2]):
            if known in names:
                yield own, names[known]


def _made_for_another(origin: Provenance, folder: Path | None, made_for: str | None) -> list[str]:
    """A warning where an adapter was trained on another model: another repository, or a path that is there.

    Paths of other machines say nothing.
    """
    trained, asked = hub_name(made_for or ""), hub_name(origin.reference)
    if trained is not None and origin.repo:
        same = trained.repo.lower() in (origin.repo.lower(), asked.repo.lower() if asked else "")
    else:
        place = Path(made_for or "")
        same = folder is None or not place.is_absolute() or not place.is_dir() or place.samefile(folder)
    name = trained.repo if trained else made_for
    return [] if same else [f"its adapter was trained on {name}, and is applied to {origin.repo or folder}"]


def is_on_hub(folder: Path, text: str) -> bool:
    """Whether a reference, seen from `folder`, can mean a repository: it has the form of one, and no file is there."""
    try:
        return hub_name(text) is not None and not (folder / expanded(text)).exists()
    except OSError:  # too long for a path
        return False


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with every repository on the Hub at the commit that its branch has now. Raises HubError."""
    return _pinned(recipe, Lookup(recipe.folder))


def _pinned(recipe: Recipe, lookup: Lookup) -> Recipe:
    """The same, and what was pinned is known to `lookup`, also of recipes inside."""
    inner: dict[str, Recipe] = {}
    pins: dict[str, str] = {}
    for name, each in recipe.inner.items():
        below = lookup.inside(each.folder)
        inner[name] = _pinned(each, below)
        pins |= below.pins

    def pin(reference: ModelReference) -> ModelReference:
        made = reference.recipe is not None
        source = reference.source if made else lookup.pin(reference.source, adapter=False)
        adapters = tuple(lookup.pin(adapter, adapter=True) for adapter in reference.adapters)
        return reference.model_copy(update={"source": source, "adapters": adapters})

    models = {name: pin(reference) for name, reference in recipe.models.items()}
    base = pin(recipe.base) if recipe.base else None
    words = recipe.tokenizer
    if words is not None and words.source not in (*models, "base", UNION):
        words = words.model_copy(update={"source": lookup.pin(words.source, adapter=False)})
    lookup.pins |= pins
    document = pinned_document(recipe.document, lookup.pins)
    return replace(recipe, base=base, models=models, tokenizer=words, document=document, inner=inner)


def pinned_document(document: Mapping[str, Any], pins: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's data in which every reference that is a key of `pins` is replaced."""

    def pin(value: Any) -> Any:
        if isinstance(value, str):
            return pins.get(value, value)
        if "recipe" in value:
            made = {**value, "recipe": pinned_document(value["recipe"], pins)}
        elif "adapter" in value:
            made = {**value, "adapter": pins.get(value["adapter"], value["adapter"])}
        else:
            made = {**value, "source": pins.get(value["source"], value["source"])}
        return made | (
            {"adapters": [pins.get(text, text) for text in value["adapters"]]} if "adapters" in value else {}
        )

    base = {"base": pin(document["base"])} if "base" in document else {}
    words = document.get("tokenizer")
    if words is not None:
        base["tokenizer"] = {**words, "source": pins.get(words["source"], words["source"])}
    return {**document, **base, "models": {name: pin(value) for name, value in document["models"].items()}}


def _is_pickled(repository: Repository) -> bool:
    return not all(name.endswith(".safetensors") for name in repository.weight_files())


def _needs_values(headers: Mapping[Path, OpenFile]) -> bool:
    """Whether shapes are told by values (bitsandbytes' 4 bits), not by headers."""
    return any(describes_codes(name) for file in headers.values() for name in file.header.slots)


def _open(place: Place, select: str | None) -> ModelSource:
    if select is not None:
        from mergetool.bundle.expert import open_expert

        return open_expert(place.path, select)
    if is_bundle(place.path):
        fix = "say which: {source: PATH, select: TASK}"
        raise SourceError("this is a bundle of several experts", str(place.path), fix)
    return open_model(place.path, place.elsewhere)
