"""Files of several recipes: YAML documents with a `name`, which others name as models, and one that is the result.

    name: mix
    models: {a: ./a, b: ./b}
    merge: {method: linear}
    ---
    base: ./base
    models: {mix: mix, c: ./c}
    merge: {method: ties}

The result is that of the document without a name, else of the last one that no other needs. What it needs becomes
recipes inside it (see `inner`), and so it is one recipe. mergekit-multi's files are such files.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Document, Place, refuse_slips
from mergetool.recipe.inner import MOST
from mergetool.recipe.mergekit import convert, is_mergekit

_OF_LOCK = frozenset({"mergetool", "recipe", "recipe_sha256", "inputs"})


@dataclass(frozen=True)
class Named:
    """One of several documents, in our language."""

    name: str | None
    document: Document
    foreign: bool
    """Whether it was mergekit's."""
    out_dtype: bool = True
    """Whether a foreign one says how its result is stored, not only in what it is computed."""

    @cached_property
    def references(self) -> dict[Place, str]:
        """What its models, and its base, are called where they are looked for."""
        data = self.document.data
        written: dict[Place, Any] = {("base",): data["base"]} if "base" in data else {}
        models = data.get("models")
        written |= {("models", key): each for key, each in models.items()} if isinstance(models, dict) else {}
        texts = {place: each.get("source") if isinstance(each, dict) else each for place, each in written.items()}
        return {place: text for place, text in texts.items() if isinstance(text, str)}


def ours(documents: Sequence[Document]) -> list[Named]:
    """All documents of a file in our language. Raises RecipeError holding every problem."""
    problems: list[RecipeError] = []
    named = []
    for each in documents:
        try:
            named.append(_named(each))
        except RecipeError as error:
            problems += error.problems
    problems += _clashes(named)
    if problems:
        raise RecipeError.of(problems)
    return _stored(named)


def _refuse_lock(document: Document) -> None:
    """Raise RecipeError for mergetool.json, which is about a recipe and its merge."""
    if isinstance(document.data, dict) and document.data.keys() >= _OF_LOCK:
        code = f"import json; json.dump(json.load(open({document.name!r}))['recipe'], open('recipe.yaml', 'w'))"
        what = "this is the lock of a merge that is done, and its recipe is a part of it"
        raise document.error((), what, f'write that where it lay (paths are relative to it): python -c "{code}"')


def _named(document: Document) -> Named:
    data = document.data
    _refuse_lock(document)
    if not is_mergekit(data):
        refuse_slips(document)
    if not isinstance(data, dict):
        raise document.error((), "a recipe is a mapping with `models` and `merge`", "see: mergetool schema")
    name = data.get("name")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise document.error(("name",), f"expected a name, found {name!r}", "write name: stage-1")
    bare = replace(document, data={key: value for key, value in data.items() if key != "name"})
    if is_mergekit(data):
        said = [(each.error, each.meaning) for each in document.slips if each.meaning]
        bare.warnings = [f"{error.where}: {error.what}: {meaning}" for error, meaning in said]
        return Named(name, convert(bare), foreign=True, out_dtype="out_dtype" in data)
    return Named(name, bare, foreign=False)


def _clashes(named: Sequence[Named]) -> Iterator[RecipeError]:
    seen: set[str | None] = set()
    for each in named:
        if each.name in seen and len(named) > 1:
            what = "there are two documents without a name" if each.name is None else f"{each.name!r} is there twice"
            fix = "add name: to all but the one whose result is wanted" if each.name is None else "choose another name"
            yield each.document.error(("name",), what, fix)
        seen.add(each.name)


def _stored(named: Sequence[Named]) -> list[Named]:
    """mergekit's `dtype` is that of sums, too: what is only read again is not rounded for its sake."""
    result = result_of(named)
    return [each if each is result or each.out_dtype else _unrounded(each) for each in named]


def _unrounded(each: Named) -> Named:
    if each.document.data.get("output") == {"dtype": "float32"}:
        return each
    data = {key: value for key, value in each.document.data.items() if key != "output"}
    return replace(each, document=replace(each.document, data=data))


def result_of(named: Sequence[Named]) -> Named:
    """The document whose result is wanted."""
    used = {text for each in named for text in each.references.values() if text != each.name}
    ends = [each for each in named if each.name is None] or [each for each in named if each.name not in used]
    return (ends or named)[-1]


def joined(named: Sequence[Named]) -> Document:
    """One recipe of all documents. Raises RecipeError for those that need each other, or have no part in the result."""
    if len(named) == 1:
        return named[0].document
    joining = _Joining({each.name: each for each in named if each.name is not None})
    result = result_of(named)
    document = joining.document(result, (result.name or "the nameless one",))
    for each in named:
        if each is result or each.name in joining.used:
            continue
        what = f"document {each.name!r} has no part in the result, which is that of {result.name or 'the nameless one'}"
        if not each.foreign:
            raise each.document.error((), what, f"name {each.name} as a model of it, or remove the document")
        document.warnings.append(f"{each.document.where(())}: {what}: it is not made")
    return document


@dataclass
class _Joining:
    """Puts documents into each other."""

    names: dict[str, Named]
    used: set[str | None] = field(default_factory=set)
    count: int = 0

    def document(self, named: Named, chain: tuple[str, ...]) -> Document:
        """A document with all that it needs inside it."""
        outer = named.document
        self.count += 1
        if self.count > MOST:
            raise outer.error((), f"more than {MOST} recipes are inside each other", "run some of them first")
        data, marks = {**outer.data}, dict(outer.marks)
        warnings = list(outer.warnings)
        for place, text in named.references.items():
            if text == named.name or text not in self.names:
                continue
            if text in chain:
                what = f"documents need each other: {' -> '.join((*chain[chain.index(text) :], text))}"
                raise outer.error(place, what, "name another model")
            self.used.add(text)
            inner = self.document(self.names[text], (*chain, text))
            marks |= {(*place, "recipe", *below): mark for below, mark in inner.marks.items()}
            warnings += [warning for warning in inner.warnings if warning not in warnings]
            _put(data, place, _reference(outer, place, inner))
        return replace(outer, data=data, marks=marks, warnings=warnings)


def _reference(outer: Document, place: Place, inner: Document) -> dict[str, Any]:
    """A model that is another document's result, with the adapters that it had."""
    node: Any = outer.data
    for key in place:
        node = node[key]
    adapters = {key: value for key, value in node.items() if key != "source"} if isinstance(node, dict) else {}
    elsewhere = {} if inner.folder == outer.folder else {"folder": str(inner.folder.absolute())}
    return {"recipe": deepcopy(inner.data), **elsewhere, **adapters}  # --set may change each by itself


def _put(data: dict[str, Any], place: Place, value: Any) -> None:
    if place == ("base",):
        data["base"] = value
    else:
        data["models"] = {**data["models"], place[-1]: value}
