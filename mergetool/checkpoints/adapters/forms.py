"""What the tensors of a network become in an adapter, and what PEFT calls them there.

The weight of a linear layer or a convolution becomes two factors. Everything else is kept in full with its module
(`modules_to_save`), biases of layers by themselves. A tensor that several modules share is kept once for each: PEFT
copies a module that it keeps in full, and nothing is shared then.

Reference: the names that PEFT's `get_peft_model_state_dict` writes.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mergetool.arch.matrices import is_matrix
from mergetool.checkpoints.adapters.keys import PREFIX
from mergetool.checkpoints.adapters.places import TASK_HEADS, leaf_of
from mergetool.checkpoints.adapters.sites import Site, SiteKind

Shape = tuple[int, ...]

_LEAVES = ("weight", "bias")
_CONVOLUTION = 4
"""Axes of the weights that have factors beside matrices; a convolution that sees single channels has none."""


@dataclass(frozen=True)
class InMemory:
    """A tensor of a checkpoint, as the network has it in memory."""

    names: tuple[str, ...]
    """Its names there: those of all modules that share it."""
    is_layer: bool = False
    """Whether it is the weight of a layer that has low-rank adapters."""
    turned: bool = False
    """Whether it is stored as (inputs, outputs)."""


@dataclass(frozen=True)
class InFull:
    """A tensor that is kept in full."""

    key: str
    """Its name in the adapter's file."""
    module: str
    """The module that is kept with it; of a bias of a layer, the layer."""


@dataclass(frozen=True)
class Form:
    """What one tensor becomes."""

    module: str
    """Whose parameter it is."""
    a: str = ""
    b: str = ""
    """Names of the factors; none where the tensor is kept in full."""
    turned: bool = False
    """Whether the network stores it as (inputs, outputs)."""
    kernel: Shape = ()
    """A convolution's axes after outputs and inputs."""
    parameter: str = ""
    """The name of a parameter that is itself a target, where it is no module's weight."""
    places: tuple[InFull, ...] = ()
    alone: bool = False
    """Whether it may be kept without the rest of its module, as biases are."""
    experts: int = 1
    """Matrices that lie one behind the other in the tensor."""
    times: int = 1
    """How often PEFT adds the product."""

    @property
    def around(self) -> str | None:
        """Of MultiheadAttention's out_proj, whose product is added twice: the attention, with which PEFT wraps it."""
        return self.module.rpartition(".")[0] if self.times > 1 else None

    def holds_alone(self, place: InFull) -> bool:
        """Whether a place may have the tensor without the rest of its module."""
        return self.alone and place.module == self.module

    @property
    def is_product(self) -> bool:
        return bool(self.a)

    @property
    def target(self) -> str:
        """What adapter_config.json calls it among the targets."""
        return self.parameter or self.module


def plain_parts(shapes: Mapping[str, Shape]) -> dict[str, InMemory]:
    """The tensors of a network of which nothing is known but names and shapes."""
    return {name: InMemory((name,), _is_layer(name, shape)) for name, shape in shapes.items()}


def _is_layer(name: str, shape: Shape) -> bool:
    if not name.endswith(".weight") or not is_matrix(name, shape, "llm", conv="matricize"):
        return False
    if leaf_of(name.removesuffix(".weight")) in TASK_HEADS or 0 in shape:
        return False
    return len(shape) == 2 or (len(shape) == _CONVOLUTION and shape[1] > 1)


def forms_of(
    wanted: Collection[str], parts: Mapping[str, InMemory], shapes: Mapping[str, Shape], apart: Collection[str] = ()
) -> dict[str, Form]:
    """The form of every wanted tensor of a network; that no adapter can hold it, `problem` says.

    What the network has as one tensor, but `apart` lists by several names, is kept by each of them for itself.
    """
    layers = {_module(part.names[0]) for part in parts.values() if part.is_layer}
    modules = {_module(name) for part in parts.values() for name in part.names if name.endswith(".weight")}
    parents = {_parent(parts[name].names[0], parts) for name in wanted}
    single = sorted((each for each in parents if each is not None), key=len)  # the outermost first: PEFT nests none
    others = {parts[name].names[0] for name in apart if name in parts}
    forms = {}
    for name in wanted:
        own, *more = parts[name].names
        names = (own, *(each for each in more if each not in others))
        parent = next((parent for parent in single if names[0].startswith(f"{parent}.")), None)
        if parent is not None:
            forms[name] = Form(_module(names[0]), places=tuple(InFull(PREFIX + each, parent) for each in names))
        elif parts[name].is_layer:
            forms[name] = _factors(parts[name], shapes[name])
        else:
            places = tuple(_place(each, layers) for each in names)
            alone = names[0].endswith(".bias") and _module(names[0]) not in modules - layers
            forms[name] = Form(_module(names[0]), places=places, alone=alone)
    return forms


def _factors(part: InMemory, shape: Shape) -> Form:
    module = _module(part.names[0])
    a, b = (f"{PREFIX}{module}.{half}.weight" for half in ("lora_A", "lora_B"))
    return Form(module, a, b, part.turned, shape[2:])


def _place(name: str, layers: Collection[str]) -> InFull:
    module, leaf = _module(name), leaf_of(name)
    return InFull(f"{PREFIX}{module}.base_layer.{leaf}" if module in layers else PREFIX + name, module)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _parent(name: str, parts: Mapping[str, InMemory]) -> str | None:
    """The module that is kept in full for a parameter that is no weight or bias; None where there is no such."""
    parent = _module(name)
    if leaf_of(name) in _LEAVES or not parent:
        return None
    below = [other for part in parts.values() for other in part.names if other.startswith(f"{parent}.")]
    return None if any(each.isdecimal() for other in below for each in other.split(".")) else parent


def form_at(site: Site) -> Form:
    """The form of what an adapter holds: the one that it has there."""
    module, hung = site.module, site.hung
    if site.is_product:
        halves, end = (("lora_A", "lora_B"), ".weight")
        if site.kind is SiteKind.EMBEDDING:
            halves, end = (("lora_embedding_A", "lora_embedding_B"), "")
        a, b = (f"{PREFIX}{hung}.{half}{end}" for half in halves)
        parameter = site.name if site.kind is SiteKind.PARAMETER else ""
        return Form(module, a, b, False, site.kernel, parameter, experts=site.experts, times=site.times)
    if site.kind is SiteKind.ADDED:
        return Form(module, places=(InFull(f"{PREFIX}{hung}.lora_B.bias", module),), alone=True)
    key = f"{PREFIX}{site.hung}.{leaf_of(site.name)}" if site.hung else PREFIX + site.name
    return Form(module, places=(InFull(key, module),), alone=site.kind is SiteKind.BIAS)


def modules_of(names: Iterable[str]) -> frozenset[str]:
    """All modules that lie on the way to parameters of these names."""
    modules = set()
    for name in names:
        while name := _module(name):
            modules.add(name)
    return frozenset(modules)


def problem(name: str, parts: Mapping[str, InMemory]) -> str | None:
    """Why no adapter can hold a tensor, or None."""
    if name not in parts:
        return "in memory it is part of another tensor, or of none"
    first = parts[name].names[0]
    if leaf_of(first) in _LEAVES or _parent(first, parts) is not None:
        return None
    return "it is a parameter of a module with layers, and PEFT keeps whole modules in full, or layers' weights"


def always_kept(forms: Mapping[str, Form], task: str | None) -> set[str]:
    """Modules that PEFT looks for in every adapter for this task, whether they are changed or not."""
    if task not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        return set()
    return {place.module for form in forms.values() for place in form.places if leaf_of(place.module) in TASK_HEADS}
