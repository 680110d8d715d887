"""YAML with a memory: plain data plus the line and column of every key and value.

The scalar rules are those of YAML 1.2 (core schema), not of YAML 1.1, whose surprises have cost people merges:

    1e-3     is the number 0.001            (1.1: text, because the mantissa has no dot)
    no, on   are text                       (1.1: false, true), so a model may be called `no`
    012      is 12                          (1.1: octal 10)
    .nan     is read, and refused later by every number field

Refused here: keys that are not text or numbers, tags (`!!python/...`), and anything that unfolds to more than 100 000
nodes (alias bombs) or nests deeper than 50. A key given twice and merge keys (`<<`) are read as YAML 1.1 has them and
noted as `slips`: our recipes have none, those of others may.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergetool.errors import RecipeError

Place = tuple[str | int, ...]
"""Keys and list indices that lead to a value, e.g. ("merge", "overrides", 0, "match")."""

_MAX_BYTES = 1_000_000
_MAX_NODES = 100_000
_MAX_DEPTH = 50
_MAX_DIGITS = 400
_INT = re.compile(r"[-+]?[0-9]+")
_OTHER_INT = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_RESOLVER = yaml.resolver.Resolver()
_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_CONSTANTS |= dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan"))


class Slip(NamedTuple):
    """Something that our recipes may not have and others' may, and what it means there."""

    error: RecipeError
    meaning: str


@dataclass
class Document:
    """A parsed recipe: `data` is plain, `marks` says where each place begins (line, column; from 1)."""

    name: str
    """What messages call it: a file name, or `--set`."""
    data: Any
    marks: dict[Place, tuple[int, int]] = field(default_factory=dict)
    folder: Path = Path()
    """What relative paths in it are relative to."""
    settings: set[Place] = field(default_factory=set)
    """Places that were given by `--set`, not in the file."""
    warnings: list[str] = field(default_factory=list)
    """What its author should know, though nothing is wrong."""
    slips: list[Slip] = field(default_factory=list)

    def where(self, place: Place) -> str:
        """`file:line:column path` of a place, or of its nearest ancestor that was written down."""
        path = ".".join(str(part) for part in place)
        if any(place[:end] in self.settings for end in range(len(place) + 1)):
            return f"--set {path}"
        for end in range(len(place), -1, -1):
            if place[:end] in self.marks:
                line, column = self.marks[place[:end]]
                return f"{self.name}:{line}:{column} {path}".rstrip()
        return f"{self.name} {path}".rstrip()

    def error(self, place: Place, what: str, fix: str = "") -> RecipeError:
        return RecipeError(what, self.where(place), fix)


def read_documents(path: Path) -> list[Document]:
    """Read a file of one or several recipes. Raises RecipeError with line and column."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RecipeError(f"the file has more than {_MAX_BYTES} bytes", str(path), "a recipe is a short YAML file")
        text = data.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", str(path), "check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 text ({error})", str(path), "save it as UTF-8") from None
    documents = parse_documents(text, str(path))
    for document in documents:
        document.folder = path.parent
    return documents


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text of one document; see `parse_documents`."""
    first, *more = parse_documents(text, name)
    if more:
        raise more[0].error((), "expected a single document, found another one", "put it in a file of its own")
    return first


def parse_documents(text: str, name: str) -> list[Document]:
    """Parse YAML text; `name` is what messages call it. Empty documents count only where there is no other.

    Raises RecipeError with line and column.
    """
    documents = [_built(root, name) for root in _roots(text, name) if root is not None]
    return [each for each in documents if each.data is not None] or documents[:1] or [Document(name, None)]


def _roots(text: str, name: str) -> list[yaml.Node | None]:
    """The documents as YAML's own nodes."""
    try:
        return list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(
            f"not valid YAML: {what}", place, "check indentation, colons and quotes at this line"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(
            f"not valid YAML: {str(error).splitlines()[0]}", name, "save it as plain UTF-8 text"
        ) from None
    except RecursionError:
        raise RecipeError(f"nested deeper than {_MAX_DEPTH} levels", name, "a recipe needs no such depth") from None


def _built(root: yaml.Node, name: str) -> Document:
    document = Document(name, None)
    document.data = _Builder(document).build(root, ())
    return document


def parse_value(text: str) -> Any:
    """A value given on the command line, by the same rules as in a file."""
    document = parse_document(text, "--set")
    refuse_slips(document)
    return document.data


def refuse_slips(document: Document) -> None:
    """Raise RecipeError for what a recipe of ours may not have."""
    if document.slips:
        raise RecipeError.of([slip.error for slip in document.slips])


class _Builder:
    """Nodes -> plain data, noting marks and counting."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def build(self, node: yaml.Node, place: Place) -> Any:
        self.count += 1
        mark = (node.start_mark.line + 1, node.start_mark.column + 1)
        self.document.marks.setdefault(place, mark)
        if self.count > _MAX_NODES:
            raise self.document.error(place, f"unfolds to more than {_MAX_NODES} nodes", "remove the aliases (*name)")
        if len(place) > _MAX_DEPTH:
            raise self.document.error(
                (), f"nested deeper than {_MAX_DEPTH} levels", "remove aliases that contain themselves"
            )
        if node.tag != _own_tag(node):
            raise self.document.error(place, f"tag {node.tag!r} is not allowed", "remove the tag; write plain values")
        if isinstance(node, yaml.MappingNode):
            return _with_merged(dict(self._items(node, place)))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*place, index)) for index, item in enumerate(node.value)]
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise self.document.error(place, f"{node.value!a} is not valid Unicode", "write plain characters")
        return _scalar(node)

    def _items(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _own_tag(key_node):
                raise RecipeError("a key must be text", f"{self.document.name}:{line}:{column}", "write a plain word")
            key = str(key_node.value)
            here = (*place, key)
            if key == "<<":
                what = "merge keys (<<) are not supported"
                self._slip(key_node, (), RecipeError(what, fix="write the fields out"), "")
            elif key in seen:
                what = f"key {key!r} is given twice (first on line {seen[key]})"
                self._slip(key_node, here, RecipeError(what, fix="keep one of them"), "the last one counts")
                del self.document.marks[here]
            seen[key] = line
            self.document.marks.setdefault(here, (line, column))
            yield key, self.build(value_node, here)

    def _slip(self, node: yaml.Node, place: Place, error: RecipeError, meaning: str) -> None:
        where = f"{self.document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        error.where = f"{where} {'.'.join(map(str, place))}".rstrip()
        self.document.slips.append(Slip(error, meaning))


def _with_merged(items: dict[str, Any]) -> dict[str, Any]:
    """A mapping with what its merge key brings, which its own keys go before."""
    merged = items.pop("<<", None)
    for each in merged if isinstance(merged, list) else [merged]:
        items = {**each, **items} if isinstance(each, dict) else items
    return items


def _own_tag(node: yaml.Node) -> str:
    """The tag of a node for which none was written."""
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        return str(_RESOLVER.resolve(yaml.ScalarNode, node.value, (True, False)))  # type: ignore[no-untyped-call]
    kind = {yaml.MappingNode: "map", yaml.SequenceNode: "seq", yaml.ScalarNode: "str"}[type(node)]
    return f"tag:yaml.org,2002:{kind}"


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if getattr(node, "style", None) is not None:  # quoted or block text
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) <= _MAX_DIGITS and (_INT.fullmatch(text) or _OTHER_INT.fullmatch(text)):
        return int(text, 0 if "o" in text or "x" in text else 10)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INF.fullmatch(text):
        return float(infinite.group(1) + "inf")
    return text
