"""Where the tensors of a checkpoint lie in a model that transformers has loaded.

It renames tensors while it loads them, and joins and divides some, differently in every version: experts of a mixture
lie one by one in a checkpoint and side by side in memory; a projection to query, key and value may lie in one tensor
and be three parameters. So nothing is known beforehand. Where everything went is read off a model that was loaded from
tensors of marks: the number of each tensor, and of each entry in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from mergetool.networks.library import quiet

Shapes = Mapping[str, tuple[int, ...]]

_DIGIT = 4096
"""Marks of entries are numbers of two digits, which float32 holds exactly."""
_FIRST = 7.25
"""The mark of the first tensor: initialisation, which fills what a checkpoint lacks, writes no such number."""


@dataclass(frozen=True)
class Fragment:
    """A box of a parameter, and the entries of a tensor of the checkpoint that it holds."""

    box: tuple[tuple[int, int], ...]
    name: str
    start: int = 0
    """The first entry, where all others follow in order."""
    order: Tensor | None = None
    """The entries, where they do not."""

    def of(self, target: Tensor) -> Tensor:
        """The box itself, as a view of the parameter."""
        return target[tuple(slice(*span) for span in self.box)]

    def put(self, target: Tensor, source: Tensor) -> None:
        """Copy the entries from the tensor into the parameter."""
        place = self.of(target)
        flat = source.reshape(-1)
        taken = flat[self.start : self.start + place.numel()] if self.order is None else flat[self.order]
        place.copy_(taken.view(place.shape))


@dataclass(frozen=True)
class TensorMap:
    """What a model's parameters and buffers are called in a checkpoint."""

    names: Mapping[str, str]
    fragments: Mapping[str, tuple[Fragment, ...]] = field(default_factory=dict)
    """What parameters are made of that are no single tensor there."""

    def views(self, name: str, tensor: Tensor, shapes: Shapes) -> dict[str, Tensor]:
        """The tensors of the checkpoint that a parameter is made of, each as a row of its memory.

        Empty where one does not lie there whole and in order.
        """
        if name in self.names:
            return {self.names[name]: tensor}
        fragments = self.fragments.get(name, ())
        views = {fragment.name: fragment.of(tensor) for fragment in fragments if fragment.order is None}
        whole = all(view.is_contiguous() and view.numel() == prod(shapes[own]) for own, view in views.items())
        return views if whole and len(views) == len(fragments) else {}


def places_of(model: Any, shapes: Shapes) -> TensorMap:
    """Where everything in a checkpoint of these shapes went in a model.

    Names that are the same, but for the prefix of a bare model, are believed. Only if that leaves tensors of the
    checkpoint over, a model of marks is loaded, as large as this one.
    """
    own, names = tensors_of(model), of_one_name(model, shapes)
    if set(names.values()) == set(shapes):
        return TensorMap(names)
    unknown = [name for name, value in own.items() if name not in names and value.numel()]
    numbers = _marked(model, shapes, 0, unknown)
    names |= {name: stored for name in unknown if (stored := whole_of(shapes, numbers[name])) is not None}
    if not (rest := [name for name in unknown if name not in names]):
        return TensorMap(names)
    digits = [numbers, *(_marked(model, shapes, digit, rest) for digit in (1, 2))]
    fragments = {name: fragments_of(shapes, [digit[name] for digit in digits]) for name in rest}
    return TensorMap(names, {name: parts for name, parts in fragments.items() if parts})


def of_one_name(model: Any, shapes: Shapes) -> dict[str, str]:
    """Tensors of a model that a checkpoint calls as the model does, but for the prefix of a bare model."""
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in tensors_of(model):
        same = (each for each in (name, prefix + name, name.removeprefix(prefix)) if each in shapes)
        if stored := next(same, None):
            names[name] = stored
    return names


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones under all their names, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _marked(model: Any, shapes: Shapes, digit: int, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of another model of this class, loaded from marks."""
    tensors = tensors_of(model_of_marks(type(model), model.config, shapes, digit))
    return {name: tensors[name].detach().float() for name in wanted}


def model_of_marks(kind: Any, config: Any, shapes: Shapes, digit: int = 0) -> Any:
    """A model of a class whose weights say which tensors of a checkpoint they are."""
    with quiet():
        return kind.from_pretrained(None, config=config, state_dict=marks(shapes, digit), dtype=torch.float32)


def marks(shapes: Shapes, digit: int) -> dict[str, Tensor]:
    """A checkpoint of marks: digit 0 is the number of each tensor, 1 and 2 are those of its entries."""
    marked = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if digit == 0:
            marked[name] = torch.full(shape, number + _FIRST)
        else:
            entries = torch.arange(prod(shape)).view(shape)
            marked[name] = (entries // _DIGIT if digit == 1 else entries % _DIGIT).float()
    return marked


def whole_of(shapes: Shapes, numbers: Tensor) -> str | None:
    """The tensor that a parameter is, told from the marks of digit 0 in it; None where it is not one whole tensor."""
    if not numbers.numel():
        return None
    number = float(numbers.reshape(-1)[0]) - _FIRST
    if number not in range(len(shapes)) or not bool((numbers == number + _FIRST).all()):
        return None
    name = list(shapes)[int(number)]
    return name if prod(shapes[name]) == numbers.numel() else None


def fragments_of(shapes: Shapes, digits: Sequence[Tensor]) -> tuple[Fragment, ...]:
    """What a parameter is made of, told from all marks in it; empty where it is not made of whole boxes."""
    names, numbers = list(shapes), digits[0] - _FIRST
    if not bool(((numbers >= 0) & (numbers < len(names)) & (numbers == numbers.round())).all()):
        return ()
    entries = digits[1].long() * _DIGIT + digits[2].long()
    fragments = []
    for number in sorted(set(numbers.reshape(-1).tolist())):
        places = (numbers == number).nonzero()
        box = tuple(zip(places.amin(0).tolist(), (places.amax(0) + 1).tolist(), strict=True))
        held = entries[tuple(slice(*span) for span in box)].reshape(-1)
        if len(held) != len(places) or len(set(held.tolist())) != len(held):
            return ()
        start = int(held[0])
        in_order = torch.equal(held, torch.arange(start, start + len(held)))
        fragments.append(Fragment(box, names[int(number)], start if in_order else 0, None if in_order else held))
    return tuple(fragments)


def composed(shape: tuple[int, ...], fragments: tuple[Fragment, ...], read: Callable[[str], Tensor | None]) -> Tensor:
    """A parameter from its fragments; zeros where `read` has nothing."""
    target: Tensor | None = None
    for fragment in fragments:
        if (source := read(fragment.name)) is not None:
            target = source.new_zeros(shape) if target is None else target
            fragment.put(target, source)
    return torch.zeros(shape) if target is None else target
