"""The stage that measures statistics of the models, one model after the other, before anything is merged.

Each is kept in the cache when it is whole, so a run that was killed goes on with the next model.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.engine.context import Context
from mergetool.engine.devices import load_linear_algebra
from mergetool.errors import PlanError, RecipeError, at
from mergetool.planning.cost import room_to_measure
from mergetool.planning.graph import Stage
from mergetool.planning.measures import StatisticSource, key_of_statistic, measuring
from mergetool.planning.sources import Lookup
from mergetool.recipe.data import Data
from mergetool.recipe.schema import Compute
from mergetool.statistics.base import Found, JointStatistic, Statistic
from mergetool.statistics.measure import STATISTICS, Measuring, Running, measured, opened
from mergetool.statistics.store import StatisticStore
from mergetool.tensors.source import SafetensorsSource

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.networks.spread import Spread


class MeasureStage:
    """After it, the statistics can be read like any other tensors."""

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run
        self._stage = stage

    def work(self) -> None:
        run = self._run
        if not run.is_left(self._stage.steps):
            return  # every unit that would need them is there already
        wanted = {
            key: source
            for key, source in run.plan.sources.items()
            if isinstance(source, StatisticSource) and not source.is_there
        }
        with run.pool.resting(run.team.local_size):
            paths = run.team.leader_first(lambda: self._measure(wanted))
        run.show({**run.plan.sources, **{key: source.filled(paths[key]) for key, source in wanted.items()}})

    def _measure(self, wanted: dict[str, StatisticSource]) -> dict[str, Path]:
        store, paths = StatisticStore(self._run.cache), {}
        asked = {key: source.asked for key, source in wanted.items() if source.asked is not None}
        together = {key: each for key, each in asked.items() if each.is_joint}
        for key, each in asked.items():
            _check_words(each)
            if key not in together:
                paths[key] = self._one(each, store)
        return paths | (self._together(together, store) if together else {})

    @cached_property
    def _running(self) -> Running:
        return running(self._run.pool.device, self._run.room, self._run.spread)

    def _one(self, asked: Measuring, store: StatisticStore) -> Path:
        """Where the statistic of one model lies."""
        run, name, key = self._run, asked.statistic.name, asked.key()
        known = store.has(key)
        if not known:
            run.teller.start(len(asked.examples), f"measuring {name} of {asked.where}", "rows")
        with at(f"measuring {name}"):
            path = measured(asked, store, key, self._running, run.teller.advance)
        self._told(asked, key, known=known)
        return path

    def _together(self, asked: dict[str, Measuring], store: StatisticStore) -> dict[str, Path]:
        """Where a statistic lies that all models have together."""
        from mergetool.engine.together import joint_key

        keys = {name: joint_key(self._run.plan, asked, name) for name in asked}
        known = all(store.has(key) for key in keys.values())
        if not known:
            for name, found in self._found_together(asked, store.folder).items():
                store.keep(keys[name], found, sorted(asked[name].form.turned))
        for name, each in asked.items():
            self._told(each, keys[name], known=known)
        return {name: store.path(key) for name, key in keys.items()}

    def _found_together(self, asked: dict[str, Measuring], folder: Path) -> Mapping[str, Found]:
        from mergetool.engine.together import PlanMerger

        run, first = self._run, next(iter(asked.values()))
        assert isinstance(first.statistic, JointStatistic)
        if run.spread is not None:
            what = f"{first.statistic.name} is measured on networks that change meanwhile, which must lie in memory"
            raise PlanError(what, "--device-map", "leave it out")
        models = {key_of_statistic(model): model for model in run.plan.recipe.models}
        rows = sum(len(each.examples) for each in asked.values())
        run.teller.start(rows, f"measuring {first.statistic.name} of all models", "rows")
        with at(f"measuring {first.statistic.name}"):
            load_linear_algebra(self._running.device)
            networks = {models[key]: opened(each, self._running, folder) for key, each in asked.items()}
            examples = {models[key]: each.examples for key, each in asked.items()}
            merger = PlanMerger(run.plan, self._running.device)
            found = first.statistic.together(networks, examples, merger, first.seed, run.teller.advance)
        return {key: found[models[key]] for key in asked}

    def _told(self, asked: Measuring, key: str, *, known: bool) -> None:
        run, name = self._run, asked.statistic.name
        how = "kept from before" if known else f"measured on {len(asked.examples)} rows"
        run.teller.say(f"{name} of {asked.where}: {how}")
        run.record.statistics[asked.where] = asked.describe() | {"key": key}


def running(device: str, room: int, spread: "Spread | None" = None) -> Running:
    """Where networks run, in memory and on a device that both have room."""
    import torch

    from mergetool.engine.devices import free_memory

    place = torch.device(device)
    there = free_memory(place)
    return Running(place, room if there is None else min(room, there), spread)


def _check_words(asked: Measuring) -> None:
    """Raise PlanError where nothing can read the rows."""
    if asked.guessed:
        fix = "write tokenizer: MODEL in `calibration`, of a model that has one"
        raise PlanError("has no tokenizer to read the rows with", asked.where, fix)


def measure_one(
    reference: str,
    statistic: str,
    data: Data,
    settings: Mapping[str, Any],
    compute: Compute,
    device: str,
    cache: Path | None,
    memory: int | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> "dict[str, Tensor]":
    """A statistic of one model, by the names of its weights. Raises SourceError, PlanError or MergeError."""
    from safetensors.torch import load_file

    from mergetool.networks.spread import Spread

    spread = None if device_map is None else Spread(device_map, memory)
    lookup = Lookup(Path.cwd())
    lookup.open("model", reference).close()
    lookup.fetch(lambda _: None)
    with closing(lookup.open("model", reference)) as source:
        asked = measuring(_statistic(statistic, settings), source, data, compute, reference)
        store = StatisticStore(cache)
        path = measured(asked, store, asked.key(), running(device, room_to_measure(memory), spread), lambda _: None)
    found, shared = load_file(path), StatisticSource.given(SafetensorsSource([path], None))
    return {name: found[shared.stored_name(name)] for name in shared.specs}


def _statistic(name: str, settings: Mapping[str, Any]) -> Statistic:
    kind = STATISTICS.get(name)
    if kind is None:
        raise RecipeError(f"there is no statistic {name!r}", "measure", f"one of: {', '.join(STATISTICS)}")
    try:
        return kind(**settings)
    except TypeError:
        known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
        raise RecipeError(
            f"{name} has no such setting: {', '.join(settings)}", "measure", f"known: {', '.join(known) or 'none'}"
        ) from None
