"""Searches of mergekit-evolve as recipes for merge3.

    genome: {models, merge_method, base_model, layer_granularity, filters, allow_negative_weights, normalize, ...}
    tasks: [NAME | {name, weight, metric}]

Both try settings of a method and ask lm-eval how good the merges are. mergekit-evolve lets its numbers go anywhere;
here they have ranges. Its groups of layers have one number each; here numbers are knots, and layers between two of them
lie between.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Document, Place
from mergetool.recipe.mergekit.counterparts import METHODS
from mergetool.recipe.mergekit.filters import globs
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.parameters import Scope
from mergetool.recipe.mergekit.reading import OutputSlice, Reading, Source
from mergetool.recipe.mergekit.roster import Roster
from mergetool.recipe.mergekit.scalars import scalar
from mergetool.recipe.schema import expanded
from mergetool.tensors.side_files import read_config

_SEARCHED = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""What mergekit-evolve searches, by method."""
_GENOME = ("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize")
_GENOME_KEYS = (*_GENOME, "allow_negative_weights", "filters", "smooth")
_TOP_KEYS = ("genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template")
_OF_A_FORK = "multi_method_genome"
_LAYERS = 32
"""How many layers a network is thought to have whose config.json is not here."""


def is_evolve(data: Any) -> bool:
    """Whether parsed YAML is a file of mergekit-evolve."""
    return isinstance(data, dict) and (isinstance(data.get("genome"), dict) or _OF_A_FORK in data)


def convert_evolve(document: Document) -> Document:
    """Our recipe for a search of mergekit-evolve. Raises RecipeError holding every problem found."""
    search = _Search(document)
    return search.findings.converted(search.convert(), search.marks)


class _Search:
    """One conversion: what was found, and where each of our values comes from."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.findings = Findings(document)
        self.genome: Mapping[str, Any] = document.data.get("genome") or {}
        self.marks: dict[Place, tuple[int, int]] = {(): document.marks.get((), (1, 1))}
        self.method = str(self.genome.get("merge_method"))

    def convert(self) -> dict[str, Any]:
        data = self.document.data
        self.findings.stray(data, (), _TOP_KEYS, {})
        if _OF_A_FORK in data:
            self.findings.problem((_OF_A_FORK,), "mergekit-evolve searches one method at a time", "write genome: {...}")
            return {}
        self.findings.stray(self.genome, ("genome",), _GENOME_KEYS, {})
        try:
            roster = self._roster()
            tasks = list(self._tasks(data.get("tasks")))
        except RecipeError as error:
            self.findings.problems += error.problems
            return {}
        self._tell_of_the_rest(data)
        out: dict[str, Any] = {}
        for place, reference, origin in roster.sections():
            holder = out if len(place) == 1 else out.setdefault("models", {})
            holder[str(place[-1])] = reference
            self.marks[place] = self.document.marks.get(origin, (1, 1))
        self.marks[("merge",)] = self.document.marks.get(("genome",), (1, 1))
        merge = {
            "method": "merge3",
            "inner": self._inner(roster),
            "tasks": tasks,
            "search": {"groups": self._groups(roster)},
        }
        return {**out, "merge": merge, "output": {"dtype": "bfloat16"}}

    def _roster(self) -> Roster:
        """The models of the genome. Raises RecipeError."""
        place: Place = ("genome", "merge_method")
        if self.method not in _SEARCHED:
            what = f"mergekit-evolve does not search {self.method!r}"
            raise self.findings.stop(place, what, f"write one of: {', '.join(_SEARCHED)}")
        reading = Reading(self.findings, {"base_model": self.genome.get("base_model")})
        listed = self.genome.get("models")
        if not isinstance(listed, list) or not listed:
            raise self.findings.stop(("genome", "models"), "expected a list of models", "write - MODEL")
        sources: dict[str, Source] = {}
        for index, each in enumerate(listed):
            here: Place = ("genome", "models", index)
            reference = reading.reference(each, here)
            if reference in sources:
                self.findings.warn(here, f"{reference} is listed twice: one of it is searched")
            sources.setdefault(reference, Source(reference, Scope({}, here), here))
        base = reading.base
        if self.method == "slerp" and base not in sources:  # it takes the best two models of each group of layers
            base = next(iter(sources))
        part = OutputSlice(list(sources.values()), [], base, ("genome", "models"))
        return Roster(self.findings, self.method, METHODS[self.method], [part])

    def _inner(self, roster: Roster) -> dict[str, Any]:
        """The method whose settings are searched, with ranges."""
        target = roster.target
        keys, count = _SEARCHED[self.method], len(roster.models)
        searched = {target.parameters[key].field: self._range(key, count) for key in keys}
        fixed = {
            each.field: each.translated(self._normalize() if key == "normalize" else each.default)
            for key, each in target.parameters.items()
            if key not in keys
        }
        filters = [str(each) for each in self.genome.get("filters") or ()]
        overrides = [{"match": glob, **searched} for text in filters for glob in globs(frozenset([text]))]
        entries = {"overrides": overrides} if overrides else {}
        return {"method": target.method, **target.constants, **fixed, **searched, **entries}

    def _normalize(self) -> bool:
        written = self.genome.get("normalize")
        return self.method != "task_arithmetic" if written is None else bool(scalar(written, bool))

    def _range(self, key: str, count: int) -> dict[str, Any]:
        """Where a number is searched, from where mergekit-evolve begins."""
        if key == "density":
            return {"search": [0.01, 1.0], "init": 1.0}
        if key == "t":
            return {"search": [0.0, 1.0], "init": 0.5}
        lowest = -1.5 if self.genome.get("allow_negative_weights") else 0.0
        return {"search": [lowest, 1.5], "init": round(1 / count, 4)}

    def _groups(self, roster: Roster) -> int:
        """How many numbers each setting has along depth."""
        each = self.genome.get("layer_granularity") or 0
        if type(each) is not int or each < 1:
            return 1
        config = read_config(expanded(roster.models[0].reference))
        known = next((config[key] for key in ("num_hidden_layers", "n_layer") if type(config.get(key)) is int), None)
        groups = max(1, (known or _LAYERS) // each)
        if known is None:
            text = f"groups of {each} layers are search.groups: {groups} here, which is right for {_LAYERS} layers"
            self.findings.warn(("genome", "layer_granularity"), text)
        return groups

    def _tasks(self, tasks: Any) -> Iterator[dict[str, Any]]:
        if not isinstance(tasks, list) or not tasks:
            raise self.findings.stop(("tasks",), "expected a list of tasks", "write - {name: TASK}")
        for index, task in enumerate(tasks):
            here: Place = ("tasks", index)
            self.marks[("merge", "tasks", index)] = self.document.marks.get(here, (1, 1))
            held = {"name": task} if isinstance(task, str) else self.findings.mapping(task, here, ("name",))
            self.findings.stray(held, here, ("name", "weight", "metric"), {})
            metric, _, name = str(held.get("metric") or "").partition(",")
            facts = {"name": held.get("name"), "metric": metric or None, "filter": name or None}
            yield {key: value for key, value in facts.items() if value is not None} | self._weight(held, here)

    def _weight(self, task: Mapping[str, Any], place: Place) -> dict[str, Any]:
        if task.get("weight") is None:
            return {}
        try:
            return {"weight": scalar(task["weight"], float)}
        except ValueError as error:
            raise self.findings.stop((*place, "weight"), str(error), "write a number") from None

    def _tell_of_the_rest(self, data: Mapping[str, Any]) -> None:
        self.findings.warn(
            (), "a search of mergekit-evolve runs as merge3, within ranges (see: mergetool methods merge3)"
        )
        for key in ("limit", "num_fewshot", "shuffle", "random_init"):
            if data.get(key):
                self.findings.warn((key,), f"it has no effect here; {_INSTEAD[key]}")


_INSTEAD = {
    "limit": "the estimator asks a few items of each task: `estimator: {items: N}`",
    "num_fewshot": "it stands in the task's own file",
    "shuffle": "items are chosen by the estimator",
    "random_init": "the search starts at `init` of each range",
}
