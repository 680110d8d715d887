"""Models that recipes inside a recipe make. They are planned first; what is planned of them stands in for their files.

A plan needs names, dtypes and shapes of a model, and the small files beside its weights. All that is known of a result
before it is made: the headers are those that will be written, and the small files are laid into a folder of their own.
When the time has come to read weights, they lie where they were planned.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from mergetool.planning.graph import Plan
from mergetool.planning.key import plan_key
from mergetool.planning.outcome import write_small_files
from mergetool.tensors.dtypes import DType
from mergetool.tensors.source import FileStamp, OpenFile, SafetensorsSource
from mergetool.tensors.temporary import folder_of

NONE: Mapping[str, Plan] = MappingProxyType({})


def place_of(plan: Plan, parts: Path) -> Path:
    """Where the result of a recipe inside another one lies: the same one, asked for twice, is made once."""
    return parts / plan_key(plan)[:16]


class PlannedModel(SafetensorsSource):
    """The result of a plan, as if it were there; it can be read once it is."""

    def __init__(self, plan: Plan) -> None:
        assert plan.output is not None
        paths = {plan.output / shard.name: shard.header for shard in plan.shards}
        files = {path: OpenFile(FileStamp(path, header.file_size, 0), header) for path, header in paths.items()}
        super().__init__(list(paths), _small_files(self, plan), elsewhere=files)
        self.stem = plan.sources[plan.template].stem
        self._narrow = plan.narrow

    def stored_as(self, name: str) -> DType:
        return self._narrow.get(name) or super().stored_as(name)


def _small_files(owner: PlannedModel, plan: Plan) -> Path:
    """A folder with config.json, and links to the files beside it and to weights that are there; it goes with its
    owner."""
    folder = folder_of(owner)
    write_small_files(plan, folder, lambda path, link: link.symlink_to(path.absolute()))
    assert plan.output is not None
    for path in sorted(plan.output.glob("*.safetensors*")):  # and their index
        (folder / path.name).symlink_to(path.absolute())
    return folder


def with_inner(plan: Plan, inner: Mapping[str, Plan]) -> Plan:
    """A plan that knows the plans of the recipes inside it, and what they have to say."""
    words = [f"{name}: {text}" for name, each in inner.items() for text in each.warnings]
    origins = {f"{name}/{key}": provenance for name, each in inner.items() for key, provenance in each.origins.items()}
    return replace(plan, inner=inner, warnings=(*words, *plan.warnings), origins={**plan.origins, **origins})


def needed(plan: Plan, is_made: Callable[[Plan], bool] = lambda _: False) -> Iterator[tuple[str, Plan]]:
    """The plans inside a plan whose results it still needs, by name, each after those that it needs itself.

    None comes twice, though several may ask for it.
    """
    seen: set[Path | None] = set()
    for name, each in _needed(plan, is_made):
        if each.output not in seen:
            seen.add(each.output)
            yield name, each


def inside(plan: Plan) -> dict[str, Plan]:
    """The plans of all recipes inside a plan, at all depths."""
    return dict(_needed(plan, lambda _: False))


def _needed(plan: Plan, is_made: Callable[[Plan], bool]) -> Iterator[tuple[str, Plan]]:
    for name, inner in plan.inner.items():
        if not is_made(inner):
            yield from ((f"{name}/{each}", deeper) for each, deeper in _needed(inner, is_made))
        yield name, inner


def bytes_on_disk(plan: Plan, is_made: Callable[[Plan], bool] = lambda _: False) -> int:
    """Most bytes that a run will add to the disk at one time: results of recipes inside go when nothing reads them."""
    made = {each.output for _, each in needed(plan, is_made) if is_made(each)}
    sizes = {each.output: each.bytes_out for each in inside(plan).values()}
    before = most = sum(sizes[place] for place in made)
    while (following := next((place for place in _places(plan, made) if place not in made), None)) is not None:
        made |= {following}
        most = max(most, sum(sizes[place] for place in made))
        made &= _places(plan, made).keys()
    return max(most, sum(sizes[place] for place in made) + plan.bytes_out) - before


def _places(plan: Plan, made: Collection[Path | None]) -> dict[Path | None, None]:
    """Where the results lie that a plan needs when these are made, in order."""
    return {each.output: None for _, each in needed(plan, lambda each: each.output in made)}
