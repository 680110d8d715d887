"""The MLPs of several dense models side by side in each layer, with gates between them; all else is the base's.

Comes with the method `moe`. An expert's matrices are those of its model, under the names of the family of mixtures. The
gates are tensors of a source of their own, which has names and shapes only until they have been measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mergetool.checkpoints.mixtures import (
    BASES,
    DOWN,
    EMPTY_WIDTH,
    GATE,
    LAYER,
    MIXTURES,
    MLP,
    UP,
    Mixture,
    fitting,
    mixture_config,
    rotation_of,
    window_of,
)
from mergetool.checkpoints.side_files import has_tokenizer
from mergetool.errors import PlanError
from mergetool.layouts.base import Arrangement, Layout, Origin, Problem, Sources
from mergetool.methods.moe import ExpertSettings, MixtureOfExperts
from mergetool.tensors.dtypes import BY_TORCH_NAME, DType
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, MemorySource, ModelSource

if TYPE_CHECKING:
    from torch import Tensor

GATES = "(gates)"
"""Key of the gates among the sources of a plan."""
_BASE = "base"
_MERGE = "merge"
_MORE = "add {name}: {{prompts: [A TEXT THAT IS FOR IT, ANOTHER]}}"


class GateSource(ModelSource):
    """Gates that are still to be measured: float32, but stored as the base is."""

    folder = None

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], stored: DType) -> None:
        self.specs = {name: TensorSpec(name, BY_TORCH_NAME["float32"], shape) for name, shape in shapes.items()}
        self._stored = stored
        self._found: MemorySource | None = None

    def filled(self, tensors: "Mapping[str, Tensor]") -> "GateSource":
        """With these values; zeros for all others."""
        import torch

        made = GateSource({name: spec.shape for name, spec in self.specs.items()}, self._stored)
        zeros = {name: torch.zeros(spec.shape) for name, spec in self.specs.items() if name not in tensors}
        made._found = MemorySource({**zeros, **tensors}, "gates")
        return made

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return ()

    def position(self, name: str) -> tuple[int, int]:
        return 0, list(self.specs).index(name)

    def stored_as(self, name: str) -> DType:
        return self._stored

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        assert self._found is not None, f"{name}: read before it was measured"
        self._found.read_bytes(name, begin, buffer)


class SideBySide(Layout):
    """The MLPs of all experts in each layer."""

    serves: ClassVar = "moe"

    method: MixtureOfExperts

    def problems(self, models: Sequence[str], has_base: bool) -> Iterator[Problem]:
        experts = self.method.experts
        yield from _unknown(self.method, experts, models)
        yield from _without_prompts(self.method, experts)
        count, asked = len(experts), self.method.experts_per_token
        if asked is not None and asked > count:
            what = f"a token cannot be sent to {asked} of {count} experts"
            yield Problem((_MERGE, "experts_per_token"), what, f"write at most {count}")
        if self.method.gate == "uniform" and asked is not None and asked < count:
            what = f"with gates that are all alike, {asked} of {count} experts would be chosen always, the others never"
            yield Problem((_MERGE, "experts_per_token"), what, f"write {count}, or gate: random")
        if self.method.shared is not None and self.method.target in ("mixtral", "qwen3-moe"):
            what = f"{self.method.target} has no shared expert"
            yield Problem((_MERGE, "shared"), what, "remove it, or write target: qwen2-moe")
        if not self.method.needs_prompts and any(each.prompts or each.avoid for each in experts.values()):
            what = f"with gate: {self.method.gate} no prompt is read, so they would have no effect"
            yield Problem((_MERGE, "gate"), what, "remove the prompts, or write gate: hidden")

    def mixture(self, sources: Sources) -> Mixture:
        """The family that is made. Raises PlanError for a base that it cannot be made of."""
        model_type = str(read_config(sources[_BASE].folder).get("model_type") or "")
        if model_type not in BASES:
            what = f"its config.json says it is {'a ' + model_type if model_type else 'nothing'}"
            fix = f"mixtures can be made of models of the types {', '.join(BASES)}"
            raise PlanError(f"{what}, of which no mixture can be made", "the base", fix)
        if self.method.target == "auto":
            chosen = fitting(model_type, shared=self.method.shared is not None)
        else:
            chosen = MIXTURES[self.method.target]
        if chosen is None or model_type not in chosen.bases:
            fits = [each.name for each in MIXTURES.values() if model_type in each.bases]
            what = f"no {self.method.target} with a shared expert" if chosen is None else f"no {chosen.name}"
            fix = f"write target: {' or '.join(fits)}" if chosen is not None else "remove shared"
            raise PlanError(f"{what} can be made of a {model_type}", "merge.target", fix)
        return chosen

    def arrange(self, sources: Sources, leader: str, models: Sequence[str]) -> Arrangement:
        mixture, experts = self.mixture(sources), self.method.experts
        _check_sources(sources, mixture, self.method, experts)
        gates = GateSource(self._gates(sources, mixture, len(experts)), _stored(sources))
        known = {**sources, GATES: gates}
        base = read_config(sources[_BASE].folder)
        shared = self.method.shared is not None
        chosen = self.method.chosen(len(experts))
        config = mixture_config(mixture, base, experts=len(experts), chosen=chosen, shared=shared)
        origins = list(self._origins(known, mixture, experts))
        remarks = (*_remarks(self.method), *(_about_foreign(len(experts), chosen) if mixture.foreign else ()))
        return Arrangement(origins, sources={GATES: gates}, config=config, remarks=tuple(remarks))

    def _gates(self, sources: Sources, mixture: Mixture, count: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the gates, and of all that says nothing."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, width in _layers(sources).items():
            shapes[mixture.gate(layer)] = (count, width)
            if mixture.gated:
                shapes[mixture.shared_gate(layer)] = (1, width)
            if mixture.gated and self.method.shared is None:
                shapes |= {mixture.shared_expert(layer, leaf): (EMPTY_WIDTH, width) for leaf in (GATE, UP)}
                shapes[mixture.shared_expert(layer, DOWN)] = (width, EMPTY_WIDTH)
        return shapes

    def _origins(self, sources: Sources, mixture: Mixture, experts: Mapping[str, ExpertSettings]) -> Iterator[Origin]:
        base, begun = sources[_BASE], set()
        for name in sorted(base.specs, key=base.position):
            match = MLP.fullmatch(name)
            having = {model: name for model, source in sources.items() if name in source.specs}
            if match is None:
                yield Origin(name, having, (), copy_of=_BASE)
                continue
            layer = match["layer"]
            if layer not in begun:
                begun.add(layer)
                own = (gate for gate in sources[GATES].specs if gate.startswith(f"{layer}."))
                yield from (Origin(gate, {GATES: gate}, (), copy_of=GATES) for gate in own)
            for number, (expert, settings) in enumerate(experts.items()):
                yield Origin(mixture.expert(layer, number, match["leaf"]), having, (settings.model or expert,))
            if self.method.shared is not None:
                yield Origin(mixture.shared_expert(layer, match["leaf"]), having, (str(self.method.shared.model),))

    def named(self, sources: Sources, gates: "Tensor") -> "dict[str, Tensor]":
        """Gates (layers, experts, hidden) by the names of tensors; a row beyond the experts is the shared one's."""
        mixture, weights = self.mixture(sources), {}
        for layer, rows in zip(_layers(sources), gates, strict=True):
            count = sources[GATES].specs[mixture.gate(layer)].shape[0]
            weights[mixture.gate(layer)] = rows[:count].contiguous()
            if mixture.gated and len(rows) > count:
                weights[mixture.shared_gate(layer)] = rows[count:].contiguous()
        return weights


def _unknown(
    method: MixtureOfExperts, experts: Mapping[str, ExpertSettings], models: Sequence[str]
) -> Iterator[Problem]:
    """Experts of no model, and models that are no expert."""
    asked: dict[tuple[str | int, ...], str] = {
        (_MERGE, "experts", name): each.model or name for name, each in experts.items()
    }
    if method.shared is not None:
        asked[_MERGE, "shared"] = method.shared.model or ""
    for place, model in asked.items():
        if model not in (_BASE, *models):
            what = f"there is no model {model!r}" if model else "whose MLPs it has is not said"
            yield Problem(place, what, f"write model: one of {', '.join((_BASE, *models))}")
    for model in models:
        if model not in asked.values():
            what = f"model {model!r} is no expert, so it would have no effect"
            yield Problem(("models", model), what, f"remove it, or {_MORE.format(name=model)} to merge.experts")


def _without_prompts(method: MixtureOfExperts, experts: Mapping[str, ExpertSettings]) -> Iterator[Problem]:
    if not method.needs_prompts:
        return
    if not any(each.prompts for each in experts.values()):
        what = f"gate: {method.gate} needs prompts, and no expert has any"
        fix = "add prompts: [A TEXT THAT IS FOR IT] to experts, or write gate: random for gates that are to be trained"
        yield Problem((_MERGE, "experts"), what, fix)
    for name, each in experts.items():
        if each.avoid and not each.prompts:
            what = "without prompts there is no direction from which to turn, so this would have no effect"
            yield Problem((_MERGE, "experts", name, "avoid"), what, "add prompts: [A TEXT THAT IS FOR IT]")


def _remarks(method: MixtureOfExperts) -> Iterator[str]:
    """What is unusual about prompts."""
    if not method.needs_prompts:
        return
    for name, each in method.experts.items():
        if not each.prompts:
            yield f"expert {name!r} has no prompts: its row of the gates is zeros, so it is called where no other is"
    asked = {(tuple(sorted(each.prompts)), tuple(sorted(each.avoid))) for each in method.experts.values()}
    if len(method.experts) > 1 and len(asked) == 1:
        yield "all experts have the same prompts, so their gates are alike and tokens are sent to any of them"


def _about_foreign(count: int, chosen: int) -> Iterator[str]:
    """What differs where the network of a mixture is code on the Hub."""
    yield "its network is code on the Hub that transformers 5 cannot import: open the result with transformers 4.41"
    if chosen == 1 < count:
        yield (
            "a deepseek multiplies what its only chosen expert says by the expert's share of the gate, where others "
            "take it whole: for that, write experts_per_token: 2, or target: mixtral"
        )


def _layers(sources: Sources) -> dict[str, int]:
    """What stands before the parts of each layer, with the width of what goes into its MLP, by number."""
    layers = {}
    for name, spec in sources[_BASE].specs.items():
        if (match := MLP.fullmatch(name)) and match["leaf"] == UP:
            layers[int(match["number"])] = (match["layer"], spec.shape[1])
    return dict(layers[number] for number in sorted(layers))


def _stored(sources: Sources) -> DType:
    layer = next(iter(_layers(sources)))
    return sources[_BASE].stored_as(f"{layer}.mlp.{UP}.weight")


def _check_sources(
    sources: Sources, mixture: Mixture, method: MixtureOfExperts, experts: Mapping[str, ExpertSettings]
) -> None:
    """Raise PlanError where the models cannot become this family of mixtures."""
    base = sources[_BASE]
    config = read_config(base.folder)
    names = [name for name in base.specs if LAYER.fullmatch(name)]
    lost = [name for name in names if MLP.fullmatch(name) is None and not mixture.takes(name)]
    if lost:
        others = [
            each.name
            for each in MIXTURES.values()
            if config["model_type"] in each.bases and all(each.takes(name) for name in lost)
        ]
        fix = f"write target: {' or '.join(others)}" if others else "make a mixture of models without it"
        raise PlanError(f"a {mixture.name} has no place for it", f"the base: {lost[0]}", fix)
    numbers = {LAYER.fullmatch(name)[1] for name in names}  # type: ignore[index]
    if not numbers or len(_layers(sources)) != len(numbers):
        what = f"{len(_layers(sources))} of its {len(numbers)} layers (model.layers.N) have an MLP of gate, up and down"
        raise PlanError(what, "the base", "make a mixture of dense models, saved whole with save_pretrained")
    _check_sizes(base, config)
    if mixture.foreign:
        _check_attention(config, shared=method.shared is not None)
    window = window_of(config)
    if window is not None and not mixture.windows:
        fits = [each.name for each in MIXTURES.values() if each.windows and config["model_type"] in each.bases]
        fix = f"write target: {fits[0]}, or " if fits else ""
        key = "use_sliding_window: false" if str(config["model_type"]).startswith("qwen") else "sliding_window: null"
        what = f"its attention sees {window} tokens only, and a {mixture.name} cannot do that as it does"
        raise PlanError(what, "the base", f"{fix}set {key} in its config.json, for contexts shorter than that")
    _check_experts(sources, experts, method)
    _check_tokenizer(base, method)


def _check_sizes(base: ModelSource, config: Mapping[str, Any]) -> None:
    """Raise PlanError where config.json says other sizes than the weights have: those of the result follow from it."""
    rows = {name: spec.shape for name, spec in base.specs.items() if (m := MLP.fullmatch(name)) and m["leaf"] == UP}
    told = {"intermediate_size": 0, "hidden_size": 1}
    for name, shape in rows.items():
        for key, axis in told.items():
            if config.get(key) != shape[axis]:
                what = f"config.json says {key} {config.get(key)}, and its shape is {list(shape)}"
                raise PlanError(what, f"the base: {name}", f"write {key}: {shape[axis]} in its config.json")
    if config.get("num_hidden_layers") != len(rows):
        what = f"config.json says num_hidden_layers {config.get('num_hidden_layers')}, and there are {len(rows)}"
        raise PlanError(what, "the base", f"write num_hidden_layers: {len(rows)} in its config.json")
    if "num_attention_heads" not in config:
        raise PlanError("config.json does not say num_attention_heads", "the base", "get its config.json again")


def _check_attention(config: Mapping[str, Any], *, shared: bool) -> None:
    """Raise PlanError for positions or heads that the code on the Hub does not know."""
    kind, _ = rotation_of(config)
    head, width = config.get("head_dim"), config["hidden_size"] // config["num_attention_heads"]
    known = kind in ("default", "linear", "dynamic")
    if not known or head not in (None, width):
        what = f"its positions are scaled by {kind}" if not known else f"its heads are {head} wide, and not {width}"
        others = (each for each in MIXTURES.values() if not each.foreign and (each.shared or not shared))
        fits = [each.name for each in others if config["model_type"] in each.bases]
        raise PlanError(f"{what}, which a deepseek does not know", "the base", f"write target: {' or '.join(fits)}")


def _check_experts(sources: Sources, experts: Mapping[str, ExpertSettings], method: MixtureOfExperts) -> None:
    """Raise PlanError for experts of another size or activation than the base's own MLPs."""
    models = [each.model or name for name, each in experts.items()]
    models += [method.shared.model] if method.shared is not None and method.shared.model else []
    ours, base = _activation(read_config(sources[_BASE].folder)), sources[_BASE].specs
    for model in models:
        for name, spec in sources[model].specs.items():
            if MLP.fullmatch(name) and name in base and spec.shape != base[name].shape:
                what = (
                    f"shape {list(spec.shape)}, and {list(base[name].shape)} in the base: an expert has the base's size"
                )
                raise PlanError(what, f"model {model!r}: {name}", "make a mixture of models of one size")
        config = read_config(sources[model].folder)
        if config and (theirs := _activation(config)) != ours:
            what = f"its MLPs have the activation {theirs}, those of the base {ours}"
            raise PlanError(what, f"model {model!r}", "make a mixture of models of one family")


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("hidden_act") or "silu")


def _check_tokenizer(base: ModelSource, method: MixtureOfExperts) -> None:
    """A base that is here has the tokenizer that prompts need."""
    here = bool(base.files) and all(stamp.path.is_file() for stamp in base.files)
    if method.needs_prompts and here and not has_tokenizer(base.folder):
        what = f"gate: {method.gate} reads prompts, and the base has no tokenizer"
        raise PlanError(what, "merge.gate", "copy its tokenizer.json there, or write gate: random")
