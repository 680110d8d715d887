"""Candidates merged straight into the weights of a model that stands ready. Nothing is written to a disk.

The arithmetic is the engine's own, slice by slice, so a candidate has the very bits that a run of its recipe writes.
The inputs are read once and stay in memory.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetool._version import __version__, installed
from mergetool.checkpoints.side_files import side_files
from mergetool.engine.logs import MemoryLog
from mergetool.engine.memory import merge_into
from mergetool.engine.sinks import LiveSink, MemorySink
from mergetool.errors import EvaluationError, PlanError
from mergetool.evaluate.language_model import LanguageModel
from mergetool.methods.base import expect
from mergetool.methods.families.search import SearchMethod
from mergetool.networks.spread import Spread
from mergetool.planning import Plan, make_plan
from mergetool.planning.graph import BASE
from mergetool.planning.numbers import keeps_operands, with_numbers
from mergetool.planning.outcome import config_of
from mergetool.recipe import load_recipe
from mergetool.recipe.candidate import candidate_recipe, settings_of
from mergetool.recipe.schema import Recipe
from mergetool.search.space import Value
from mergetool.tensors.digests import remembered_sha256
from mergetool.tensors.dtypes import DType
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of, sha256_file
from mergetool.tensors.side_files import CONFIG_NAME
from mergetool.tensors.source import FileStamp, ModelSource


class ResidentSource(ModelSource):
    """A model whose stored bytes were read into memory."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.folder = source.folder
        self.specs: Mapping[str, TensorSpec] = source.specs
        self._bytes: dict[str, Tensor] = {}
        for name, spec in source.specs.items():
            held = torch.empty(spec.num_bytes, dtype=torch.uint8)
            if spec.num_bytes:
                source.read_bytes(name, 0, bytes_of(held))
            self._bytes[name] = held
        source.close()

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._source.files

    def position(self, name: str) -> tuple[int, int]:
        return self._source.position(name)

    def stored_as(self, name: str) -> DType:
        return self._source.stored_as(name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(self._bytes[name][begin : begin + len(buffer)])


class Candidates:
    """Merges candidates of a search recipe into a live model."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, ModelSource],
        device: str,
        batch_size: int,
        spread: Spread | None = None,
    ) -> None:
        self._recipe = recipe
        self._sources = {name: ResidentSource(source) for name, source in sources.items()}
        self._reshapes = recipe.method.searches and expect(recipe.method, SearchMethod).reshapes
        if self._reshapes and spread is not None:
            what = "candidates are networks of other depths, and only a network that stays can be dealt out"
            raise PlanError(what, "--device-map", "leave it out")
        plan = self._plan = make_plan(recipe, sources=self._sources)
        folder = plan.sources[plan.template].folder
        if folder is None:
            what = "is a bare file without config and tokenizer, so merges of it cannot be evaluated"
            raise EvaluationError(what, plan.template, "name a model folder")
        asked = recipe.output.dtype
        self.live = LanguageModel(
            folder,
            tokenizer=self._sources[recipe.tokenizer.source].folder if recipe.tokenizer else None,
            dtype="auto" if asked == "source" else asked,
            device=device,
            batch_size=batch_size,
            spread=spread,
            written=True,
        )
        self._slots = self._slots_of(plan)
        self._device = torch.device(device)
        self._log = MemoryLog()
        self.inputs = {name: _content(source, self._selected(name)) for name, source in self._sources.items()}
        """SHA-256 of what the base and every model hold, in the recipe's order."""
        self.made_with = _versions() | {"device": self.live.device.type, "dtype": str(self.live.model.dtype)}
        """What answers depend on beside weights and items."""
        self._network = _network(folder, self.live.tokenizer_folder)

    def identity(self, subject: str | Sequence[Value]) -> str:
        """All that decides the answers of a candidate (or of a model of the recipe), as a SHA-256.

        Settings and numbers, inputs by content, and what runs them; not where anything lies, nor what else the recipe
        says.
        """
        recipe = self._recipe
        facts: list[Any] = [self.made_with, self._network, recipe.output.dtype]
        if isinstance(subject, str):
            facts += [self.inputs[name] for name in self._parts(subject)]
        else:
            sections = settings_of(recipe, subject)
            facts += [list(self.inputs.items()), sections.pop("merge")]
            facts += [recipe.compute.model_dump(), recipe.check.model_dump(), *([sections] if sections else [])]
            facts += [[step.model_dump() for step in recipe.then]] if recipe.then else []
        return _sha256(facts)

    def put(self, values: Sequence[Value], *, digest: bool = False) -> str | None:
        """Merge the candidate with these numbers into the live model. Returns its digest if asked for."""
        return self._put(self._planned(candidate_recipe(self._recipe, values)), digest=digest)

    def put_recipe(self, recipe: Recipe) -> None:
        """Merge another recipe, of these models or of some of them, into the live model."""
        wanted = {*recipe.models, *([BASE] if recipe.base is not None else [])}
        sources = {name: source for name, source in self._sources.items() if name in wanted}
        self._put(make_plan(recipe, sources=sources), digest=False)

    def _planned(self, recipe: Recipe) -> Plan:
        """The first plan with other numbers; a plan of its own where other tensors are copied."""
        if not self._reshapes and keeps_operands(self._plan, recipe):
            return with_numbers(self._plan, recipe)
        return make_plan(recipe, sources=self._sources)

    def put_model(self, name: str) -> None:
        """Put one of the models itself (or the base) there; what it lacks, the base or first model has."""
        for source in self._parts(name):
            self._copy(source)

    def _parts(self, name: str) -> list[str]:
        """The sources that make up one of the models, the last one first of all asked: itself, on the template."""
        if self._reshapes:
            return [name]
        template = BASE if BASE in self._sources else next(iter(self._sources))
        lacks = self._slots.keys() - self._sources[name].specs.keys()
        return list(dict.fromkeys([template, name] if lacks else [name]))

    def _selected(self, name: str) -> str | None:
        reference = self._recipe.base if name == BASE else self._recipe.models[name]
        return None if reference is None else reference.select

    def _copy(self, name: str) -> None:
        label = f"{name} itself" if name == BASE else name
        recipe = load_recipe({"models": {label: "in memory"}, "merge": {"method": "passthrough"}})
        recipe = replace(recipe, output=self._recipe.output)
        self._put(make_plan(recipe, sources={label: self._sources[name]}), digest=False)

    def _slots_of(self, plan: Plan) -> Mapping[str, Tensor]:
        """The live tensors that are written in place; none where every candidate is a network of its own."""
        return {} if self._reshapes else self.live.slots({name: spec.shape for name, spec in plan.specs.items()})

    def _become(self, plan: Plan, *, digest: bool) -> str | None:
        """Have the live model be another network, which is made beside it."""
        sink = MemorySink(plan)
        merge_into(plan, sink, str(self._device), self._log)
        made = saved_digest(sink.source()) if digest else None
        self.live.become(config_of(plan), sink.tensors)
        return made

    def _put(self, plan: Plan, *, digest: bool) -> str | None:
        if self._reshapes:
            return self._become(plan, digest=digest)
        sink = LiveSink(self._slots, plan, digest=digest)
        merge_into(plan, sink, str(self._device), self._log)
        return None if sink.digests is None else total_digest(sink.digests)


def _content(source: ModelSource, selected: str | None) -> str:
    """What a model holds, wherever it lies: its files, and which of a bundle's experts is meant."""
    return _sha256([[remembered_sha256(stamp.path) for stamp in source.files], selected])


def _network(folder: Path, tokenizer: Path) -> str:
    """What is run beside the weights: config and tokenizer."""
    files = [folder / CONFIG_NAME, *(tokenizer / name for name in side_files(tokenizer))]
    return _sha256([[path.name, sha256_file(path)] for path in files])


def _versions() -> dict[str, str]:
    return {"mergetool": __version__} | {name: installed(name) for name in ("torch", "transformers", "lm_eval")}


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def total_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the SHA-256 of every tensor's stored bytes, by name."""
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def saved_digest(source: ModelSource) -> str:
    """The same digest of a checkpoint on the disk."""
    digests = {}
    for name, spec in source.specs.items():
        held = bytearray(spec.num_bytes)
        source.read_bytes(name, 0, memoryview(held))
        digests[name] = hashlib.sha256(held).hexdigest()
    return total_digest(digests)
