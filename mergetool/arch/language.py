"""The language of architecture files (`arch/data/*.yaml`, or a user's own): what may be written, and how it is read.

A file describes one family of networks. Names are forms (`{i}` stands for an integer; on the right-hand side
`{i-1}` is arithmetic on it), and every tensor lists the layout of its axes, separated by commas:

    model.layers.{i}.self_attn.q_proj.weight: kv.{i} q.{i} _, residual
    blocks.{i}.attn.qkv.weight:               head.{i} qk.{i} + head.{i} qk.{i} + head.{i} vo.{i}, residual
    model.norm.weight:                        abs(residual)

A layout is one or more segments joined by `+` (concatenation), a segment one or more factors side by side (row-major
product), a factor the name of a space, a number, or `_`: a fixed factor of whatever size is left. `abs(x)` moves with
the space x but without its signs.

`spaces` declares every name used: its symmetry (permutation, signed, flip, fixed), the outer space it lies `within`,
and, where shapes alone cannot tell, its `size`: a number or arithmetic on keys of config.json; of a list, the first
whose keys are all known. `sizes` gives or overrides such keys. The other sections are told in `ArchFamily`.

A whole file, for two linear layers around one hidden layer:

    spaces: {hidden: permutation}
    tensors:
      first.weight: hidden, _
      first.bias: hidden
      last.weight: _, hidden
      last.bias: _

`mergetool.derive_architecture` writes such a file for a module; docs/architecture-files.md tells it to users.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergetool.errors import PlanError
from mergetool.kernels.spaces import Symmetry

_FACTOR = re.compile(r"abs\(([^()\s]+)\)|(\d+)(?![\w.{])|([A-Za-z][\w.]*(?:\{[^{}]*\}[\w.]*)*)|(_)|(\+)|(\S)")
_HELP = "the language is told by: python -m pydoc mergetool.arch.language"
_HOLE = re.compile(r"\{([^{}]*)\}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpaceRule(_Strict):
    """How the spaces of one form move."""

    symmetry: Symmetry = "permutation"
    within: str | None = None
    size: int | str | list[int | str] | None = None


class Identity(_Strict):
    """`space` is the same as `is`: `when` one of these tensors is there, `unless` one is, for these `architectures`.

    With `pad`, a wider `space` is that other one with new channels around it (a shortcut without parameters):
    half on each side (`centre`), or all behind (`end`).
    """

    space: str
    same: str = Field(alias="is")
    when: list[str] = []
    unless: list[str] = []
    architectures: list[str] = []
    pad: Literal["centre", "end"] | None = None


class Tie(_Strict):
    """Names of one and the same tensor, if the key `when` of config.json says so (`default` if it is silent)."""

    names: list[str]
    when: str | None = None
    default: bool = True


class Match(_Strict):
    """What config.json says of this family: its `model_type`, or globs on its `architectures` (`architecture`)."""

    model_type: list[str] = []
    architectures: list[str] = []


class ArchFamily(_Strict):
    """One architecture file.

    `extends`: a family or file to start from; mappings are joined, what is said here wins.
    `variants`: like `sizes`, for architectures whose name in config.json fits a glob.
    `prefixes`: what may stand before every name. `requires`: forms that must be met for the file to apply.
    `buffers`: like `tensors`, but left out when models are compared. `fixed`: globs of tensors that never move.
    `layers`: how names of the repeated blocks begin; the numbers in the holes, sorted, count the layers.
    `identities`: spaces that are one. `tied`: names that are one tensor.
    `chain`: instead of names, a chain of layers found from shapes (`linear`, `conv`).
    """

    about: str = ""
    extends: str | None = None
    match: Match = Match()
    prefixes: list[str] = [""]
    requires: list[str] = []
    sizes: dict[str, int] = {}
    variants: dict[str, dict[str, int]] = {}
    spaces: dict[str, SpaceRule] = {}
    tensors: dict[str, str] = {}
    buffers: dict[str, str] = {}
    fixed: list[str] = []
    layers: list[str] = []
    identities: list[Identity] = []
    tied: list[Tie] = []
    chain: list[Literal["linear", "conv"]] = []

    @field_validator("spaces", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """`residual: signed` is short for `residual: {symmetry: signed}`."""
        if not isinstance(value, dict):
            return value
        return {name: {"symmetry": rule} if isinstance(rule, str) else rule or {} for name, rule in value.items()}


@dataclass(frozen=True)
class Term:
    """One factor as written: the name of a space, a number, or (neither) a fixed factor of unknown size."""

    space: str | None = None
    size: int | None = None
    signed: bool = True


Axis = tuple[tuple[Term, ...], ...]


def parse_axes(text: str) -> tuple[Axis, ...]:
    """Layouts as written, one per axis. Raises ValueError quoting what cannot be read."""
    return tuple(_parse_axis(axis) for axis in text.split(",")) if text.strip() else ()


def _parse_axis(text: str) -> Axis:
    segments: list[list[Term]] = [[]]
    for absolute, number, name, hole, plus, other in _FACTOR.findall(text):
        if other:
            raise ValueError(f"cannot read {other!r} in the layout {text.strip()!r}")
        if plus:
            segments.append([])
        elif hole:
            segments[-1].append(Term())
        elif number and int(number) < 1:
            raise ValueError(f"a factor of size 0 in the layout {text.strip()!r}")
        elif number:
            segments[-1].append(Term(size=int(number)))
        else:
            segments[-1].append(Term(space=absolute or name, signed=not absolute))
    if not all(segments):
        raise ValueError(f"an empty segment in the layout {text.strip()!r}")
    return tuple(tuple(segment) for segment in segments)


def fill(form: str, holes: Mapping[str, int]) -> str:
    """The form with its holes filled: `stage.{s-1}` with s = 3 is `stage.2`."""
    return _HOLE.sub(lambda hole: str(evaluate(hole.group(1), holes)), form)


@cache
def pattern(form: str) -> re.Pattern[str]:
    """A regular expression for the names a form stands for; one named group per hole."""
    parts: list[str] = []
    seen: set[str] = set()
    for part in re.split(r"(\{[^{}]*\})", form):
        if not part.startswith("{"):
            parts.append(re.escape(part))
            continue
        name = part[1:-1]
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>\\d+)")
        seen.add(name)
    return re.compile("".join(parts))


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str | int, values: Mapping[str, Any]) -> int:
    """Integer arithmetic (+ - * //) on names. Raises KeyError for an unknown name, ValueError for anything else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            if not isinstance(values.get(node.id), int):
                raise KeyError(node.id)
            return int(values[node.id])
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"cannot compute {expression!r}: write integers, names, + - * //")

    try:
        return value(ast.parse(str(expression), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"cannot compute {expression!r}: {error}") from None


def first_known(size: int | str | Sequence[int | str], values: Mapping[str, Any]) -> int:
    """The value of the first expression whose names are all known. Raises KeyError naming the missing key."""
    choices = [size] if isinstance(size, int | str) else size
    for number, expression in enumerate(choices):
        try:
            return evaluate(expression, values)
        except KeyError:
            if number == len(choices) - 1:
                raise
    raise KeyError("size")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key written twice, which YAML would let win silently."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key!r} is written twice")
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_family(path: Path, find: Callable[[str, Path], Path]) -> ArchFamily:
    """Read an architecture file, and what it extends (`find(name, path)` locates that file).

    Raises PlanError naming the file and the entry.
    """
    content = _read(path, find, ())
    try:
        family = ArchFamily.model_validate(content)
        for name, axes in {**family.tensors, **family.buffers}.items():
            _check_names(family, name, parse_axes(axes))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{place}: {first['msg']}", where=str(path), fix=_HELP) from None
    except ValueError as error:
        raise PlanError(str(error), where=str(path), fix=_HELP) from None
    return family


def _read(path: Path, find: Callable[[str, Path], Path], seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise PlanError("the file extends itself", where=str(path))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys) or {}
    except OSError as error:
        raise PlanError(f"cannot read the architecture file: {error.strerror}", str(path), "check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"not valid YAML: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise PlanError("an architecture file is a mapping", where=str(path))
    if "extends" in content:
        parent = _read(find(str(content["extends"]), path), find, (*seen, path))
        for key in ("match", "about"):
            parent.pop(key, None)
        joined = {key: {**parent[key], **content[key]} for key in parent if _both_maps(parent, content, key)}
        content = {**parent, **content, **joined}
    return content


def _both_maps(first: Mapping[str, Any], second: Mapping[str, Any], key: str) -> bool:
    return isinstance(first.get(key), dict) and isinstance(second.get(key), dict)


def _check_names(family: ArchFamily, name: str, axes: Sequence[Axis]) -> None:
    declared = [pattern(form) for form in family.spaces]
    holes = dict.fromkeys(pattern(name).groupindex, 7)
    for term in (term for axis in axes for segment in axis for term in segment if term.space is not None):
        assert term.space is not None
        try:
            instance = fill(term.space, holes)
        except KeyError as error:
            raise ValueError(f"{name}: {term.space!r} uses {error}, which the name has not") from None
        if not any(form.fullmatch(instance) for form in declared):
            raise ValueError(f"{name}: space {term.space!r} is not declared under `spaces`")
