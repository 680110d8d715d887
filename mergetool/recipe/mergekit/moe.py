"""Files of mergekit-moe as recipes for `moe`.

    base_model, experts: [{source_model, positive_prompts, negative_prompts, noise_scale, residual_scale}]
    gate_mode, experts_per_token, shared_experts, dtype, architecture

An expert is called like its model; a model's second expert gets a number. What mergekit-moe does to single experts
(noise, a factor) becomes overrides.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Document, Place
from mergetool.recipe.mergekit.counterparts import Counterpart
from mergetool.recipe.mergekit.findings import Findings
from mergetool.recipe.mergekit.parameters import Scope
from mergetool.recipe.mergekit.reading import OutputSlice, Reading, Source
from mergetool.recipe.mergekit.roster import Roster
from mergetool.recipe.mergekit.scalars import scalar
from mergetool.recipe.render import suggestion

_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_TOP_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
_GATES = {
    "hidden": "hidden",
    "hidden_last": "hidden",
    "hidden_avg": "hidden-avg",
    "cheap_embed": "embedding",
    "random": "random",
    "uniform_random": "uniform-random",
}
_TARGETS = {"mixtral": "mixtral", "deepseek moe": "deepseek", "qwen moe": "qwen2-moe", "qwen3 moe": "qwen3-moe"}
"""What mergekit-moe calls its families; their beginnings will do."""
_STORED = ("float32", "bfloat16", "float16")


def is_moe(data: Any) -> bool:
    """Whether parsed YAML is a file of mergekit-moe."""
    listed = data.get("experts") if isinstance(data, dict) and "merge" not in data else None
    return isinstance(listed, list) and any(isinstance(each, dict) and "source_model" in each for each in listed)


def convert_moe(document: Document) -> Document:
    """Our recipe for a file of mergekit-moe. Raises RecipeError holding every problem found."""
    reading = _Mixture(document)
    return reading.findings.converted(reading.convert(), reading.marks)


class _Mixture:
    """One conversion: what was found, and where each of our values comes from."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data: Mapping[str, Any] = document.data
        self.findings = Findings(document)
        self.reading = Reading(self.findings, {"base_model": self.data.get("base_model")})
        self.marks: dict[Place, tuple[int, int]] = {(): document.marks.get((), (1, 1))}

    def convert(self) -> dict[str, Any]:
        self.findings.stray(self.data, (), _TOP_KEYS, {})
        if not self.data.get("base_model"):
            self.findings.problem((), "mergekit-moe needs a base model", "add base_model: MODEL")
            return {}
        try:
            experts = list(self._sources("experts"))
            shared = list(self._sources("shared_experts"))
            roster = self._roster([*experts, *shared])
            return {**self._models(roster), "merge": self._merge(roster, experts, shared), **self._storage()}
        except RecipeError as error:
            self.findings.problems += error.problems
            return {}

    def _sources(self, key: str) -> Iterator[Source]:
        """The models of experts, in order."""
        listed = self.data.get(key) or ()
        if not isinstance(listed, list | tuple):
            raise self.findings.stop((key,), "expected a list of experts", "write - source_model: MODEL")
        for index, held in enumerate(listed):
            here: Place = (key, index)
            self.findings.stray(self.findings.mapping(held, here, _EXPERT_KEYS), here, _EXPERT_KEYS, {})
            if not held.get("source_model"):
                raise self.findings.stop(here, "an expert needs a model", "write - source_model: MODEL")
            reference = self.reading.reference(held["source_model"], (*here, "source_model"))
            yield Source(reference, Scope({}, here), here)

    def _roster(self, sources: Sequence[Source]) -> Roster:
        once = list({each.reference: each for each in sources}.values())
        alone = [each.reference for each in once] == [self.reading.base]
        if alone:
            what = "every expert is the base itself: until it is trained, the mixture computes what the base does"
            self.findings.warn(("experts",), what)
        part = OutputSlice(once, [], None if alone else self.reading.base, ("experts",))
        return Roster(self.findings, "mergekit-moe", Counterpart("moe", "optional", {}), [part])

    def _models(self, roster: Roster) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for place, reference, origin in roster.sections():
            holder = out if len(place) == 1 else out.setdefault("models", {})
            holder[str(place[-1])] = reference
            self._mark(place, origin)
        return {"base": next(iter(out["models"].values())), **out}  # the base itself, where it is the only model

    def _mark(self, place: Place, origin: Place) -> None:
        self.marks[place] = self.document.marks.get(origin, (1, 1))

    def _merge(self, roster: Roster, experts: Sequence[Source], shared: Sequence[Source]) -> dict[str, Any]:
        self._mark(("merge",), ("experts",))
        gate = self._gate()
        named: dict[str, Any] = {}
        overrides: list[dict[str, Any]] = []
        for index, source in enumerate(experts):
            model = str(roster.called(source.reference))
            copies = sum(name == model or each.get("model") == model for name, each in named.items())
            name = model if not copies else f"{model}-{copies + 1}"
            named[name] = {**({"model": model} if copies else {}), **self._prompts(source, gate)}
            overrides += self._changes(source, f"*.experts.{index}.*")
            self._mark(("merge", "experts", name), source.place)
        merge: dict[str, Any] = {"method": "moe", "target": self._target(shared, gate), "gate": gate, "experts": named}
        if self.data.get("experts_per_token") is not None:
            merge["experts_per_token"] = self._number(("experts_per_token",), int)
        if len(shared) > 1:
            what = f"{len(shared)} shared experts, and no family has more than one"
            self.findings.problem(("shared_experts",), what, "keep one")
        for source in shared[:1]:
            merge["shared"] = {"model": str(roster.called(source.reference)), **self._prompts(source, gate)}
            overrides += self._changes(source, "*.shared_expert*_proj.weight")
            self._mark(("merge", "shared"), source.place)
        return {**merge, **({"overrides": overrides} if overrides else {})}

    def _gate(self) -> str:
        mode = str(self.data.get("gate_mode") or "hidden")
        if mode not in _GATES:
            fix = suggestion(mode, _GATES) or f"write one of: {', '.join(_GATES)}"
            self.findings.problem(("gate_mode",), f"mergekit-moe has no gate mode {mode!r}", fix)
        return _GATES.get(mode, "hidden")

    def _target(self, shared: Sequence[Source], gate: str) -> str:
        """The family that is asked for, or the one that mergekit-moe would choose."""
        asked = self.data.get("architecture")
        if not asked:
            silent = shared and gate != "random" and not self._held(shared[0]).get("positive_prompts")
            return "deepseek" if silent else "auto"
        fits = [ours for theirs, ours in _TARGETS.items() if theirs.startswith(str(asked).lower())]
        if not fits:
            known = ", ".join(_TARGETS)
            self.findings.problem(("architecture",), f"mergekit-moe has no {asked!r}", f"write one of: {known}")
        return fits[0] if len(fits) == 1 else "auto"

    def _held(self, source: Source) -> Mapping[str, Any]:
        key, index = source.place
        held: Mapping[str, Any] = self.data[str(key)][index]
        return held

    def _prompts(self, source: Source, gate: str) -> dict[str, Any]:
        held = self._held(source)
        asked = {"prompts": held.get("positive_prompts"), "avoid": held.get("negative_prompts")}
        prompts = {key: value for key, value in asked.items() if value}
        if not prompts or gate not in ("random", "uniform-random"):
            return prompts
        keys = [key for key in ("positive_prompts", "negative_prompts") if held.get(key)]
        self.findings.idle(keys, source.place, "random gates read no prompt")
        return {}

    def _changes(self, source: Source, match: str) -> list[dict[str, Any]]:
        """Noise and a factor of one expert."""
        held = self._held(source)
        words = {"noise": "noise_scale", "scale": "residual_scale"}
        numbers = {
            ours: self._number((*source.place, theirs), float)
            for ours, theirs in words.items()
            if held.get(theirs) is not None
        }
        return [{"match": match, **numbers}] if numbers else []

    def _number(self, place: Place, kind: type) -> Any:
        node: Any = self.data
        for key in place:
            node = node[key]
        self._mark(("merge", str(place[-1])), place)
        try:
            return scalar(node, kind)
        except ValueError as error:
            raise self.findings.stop(place, str(error), "write a number") from None

    def _storage(self) -> dict[str, Any]:
        written = self.data.get("dtype")
        if not written:
            return {}
        name = str(written).removeprefix("torch.")
        if name not in _STORED:
            fix = suggestion(name, _STORED) or "write dtype: bfloat16"
            self.findings.problem(("dtype",), f"results cannot be stored as {name}", fix)
        return {"output": {"dtype": name}}
