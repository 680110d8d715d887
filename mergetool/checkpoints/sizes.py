"""Sizes that config.json states, and tensors of another size that were taken from a parent which states others.

Which key a tensor's axis follows is read off two models that differ: a key explains an axis if both changed from one
model to the other in the same way: to the same number, by the same difference (two more rows than positions), by the
same factor, or as the patches of an image do. If several explain it, words of the name decide.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergetool.errors import PlanError

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Key = tuple[str, str]
"""Part of a config ("" for itself) and key."""
Values = Mapping[Key, Any]

_NO_SIZE = re.compile(
    r".*(token_id|token_index|_per_tok|top_k|window|version|dropout|layers?|theta|scaling|factor|length|beams|group|stride"
    r"|heads?|num_labels)"
)
_WORDS = (
    (r"posit|n_ctx", r"posit|wpe|pos_emb"),
    (r"image|patch|channel", r"posit|patch|pos_emb|conv"),
    (r"type_vocab", r"token_type"),
    (r"expert", r"gate|router|expert"),
    (r"^vocab", r"embed|head|shared|wte|logits_bias|predictions|proj_out|vocab"),
    (r"inter|inner|ffn|d_ff", r"mlp|ff|fc|inter|\.wi|\.wo|expert|dense|output"),
    (r"mel", r"conv"),
)
"""What keys and the names of their tensors have in common."""


@dataclass(frozen=True)
class Sized:
    """A model as its config describes it."""

    config: Config
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class SizeChange:
    """A size that the result has from another parent than its config."""

    key: Key
    value: Any
    parent: str

    @property
    def where(self) -> str:
        """The key, for messages."""
        return f"config.json: {'.'.join(filter(None, self.key))}"


def changed_sizes(
    leader: Sized, parents: Mapping[str, Sized], written: Mapping[str, Shape]
) -> tuple[list[SizeChange], dict[str, str]]:
    """What a config must say differently, and tensors of another size that no key explains, with whose they are.

    Raises PlanError where some of the tensors that follow a key have one size, and some another.
    """
    changes: dict[Key, SizeChange] = {}
    strange: dict[str, str] = {}
    told: set[str] = set()
    for model, parent in parents.items():
        taken = [name for name in _changed(leader, written) if parent.shapes.get(name) == written[name]]
        if not taken or not parent.config:
            continue
        explained = dict(_explained(leader, parent))
        told |= {name for name in taken if explained.get(name)}
        strange |= {name: model for name in taken if name not in strange}
        for key in dict.fromkeys(key for name in taken for key in explained.get(name, ())):
            _note(changes, SizeChange(key, _values(parent.config)[key], model))
            left = [name for name, keys in explained.items() if key in keys and name in written and name not in taken]
            if left:
                raise _torn(changes[key], _values(leader.config)[key], taken[0], left)
    return list(changes.values()), {name: model for name, model in strange.items() if name not in told}


def _changed(leader: Sized, written: Mapping[str, Shape]) -> list[str]:
    return [name for name, shape in written.items() if leader.shapes.get(name, shape) != shape]


def _note(changes: dict[Key, SizeChange], change: SizeChange) -> None:
    known = changes.setdefault(change.key, change)
    if known.value != change.value:
        raise PlanError(
            f"some tensors are as large as {known.value} asks for, of model {known.parent!r}, others as {change.value} "
            f"does, of model {change.parent!r}",
            change.where,
            "take all of them from one model",
        )


def _torn(change: SizeChange, old: Any, name: str, left: list[str]) -> PlanError:
    globs = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", each) for each in left)
    overrides = ", ".join(f"{{match: {glob!r}, use: {change.parent}}}" for glob in globs)
    what = f"{name} is as large as {change.value} asks for, of model {change.parent!r}, and {left[0]} as {old} does"
    return PlanError(what, change.where, f"take all of them from one model: overrides: [{overrides}]")


def _explained(leader: Sized, parent: Sized) -> Iterator[tuple[str, set[Key]]]:
    """The keys that tell of the sizes in which two models differ, by tensor."""
    ours, theirs = _values(leader.config), _values(parent.config)
    keys = [key for key, value in ours.items() if key in theirs and theirs[key] != value]
    for name, shape in leader.shapes.items():
        other = parent.shapes.get(name, shape)
        if other == shape or len(other) != len(shape):
            continue
        axes = [(old, new) for old, new in zip(shape, other, strict=True) if old != new]
        explained: set[Key] = set()
        for old, new in axes:
            explained |= set(_best(name, old, new, [(key, ours, theirs) for key in keys]))
        yield name, explained


def _best(name: str, old: int, new: int, keys: list[tuple[Key, Values, Values]]) -> list[Key]:
    """The keys that explain an axis best."""
    ranks: dict[Key, int] = {}
    for key, ours, theirs in keys:
        rank = _rank(key, (old, new), (ours[key], theirs[key]), (ours, theirs))
        if rank:
            ranks[key] = rank + (4 if _akin(key[1], name) else 0)
    return [key for key, rank in ranks.items() if rank == max(ranks.values())]


def _rank(key: Key, sizes: tuple[int, int], values: tuple[Any, Any], configs: tuple[Values, Values]) -> int:
    """How well a key explains that an axis changed: 3 if it is the key's number, 0 not at all."""
    if key[1] == "image_size":
        patches = [
            _patches(value, config.get((key[0], "patch_size"))) for value, config in zip(values, configs, strict=True)
        ]
        return 3 if patches[1] - patches[0] == sizes[1] - sizes[0] or values == sizes else 0
    if not all(type(value) is int and value > 0 for value in values):
        return 0
    if values == sizes:
        return 3
    if values[1] - values[0] == sizes[1] - sizes[0]:
        return 2
    return 1 if values[1] * sizes[0] == values[0] * sizes[1] else 0


def _patches(image: Any, patch: Any) -> int:
    sides = [each if isinstance(each, list) and len(each) == 2 else [each, each] for each in (image, patch)]
    if not all(type(number) is int and number > 0 for side in sides for number in side):
        return 0
    return int(sides[0][0] // sides[1][0] * (sides[0][1] // sides[1][1]))


def _akin(key: str, name: str) -> bool:
    return any(re.search(mine, key) and re.search(theirs, name) for mine, theirs in _WORDS)


def _values(config: Config) -> dict[Key, Any]:
    """Sizes that a config states, those of its parts with the part's name."""
    parts = {"": config} | {key: part for key, part in config.items() if isinstance(part, dict)}
    return {
        (part, key): value
        for part, settings in parts.items()
        for key, value in settings.items()
        if isinstance(value, int | list) and not isinstance(value, bool) and not _NO_SIZE.fullmatch(key)
    }
