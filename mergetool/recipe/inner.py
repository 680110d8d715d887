"""Recipes inside a recipe: the result of another one as a model, or as the base.

    models: {mix: {recipe: ./first.yaml}}             a file; its relative paths are relative to itself
    models: {mix: {recipe: {models: ..., merge: ...}}}    written here; relative paths as in the recipe around it

Each is read and checked like one by itself, and so in turn are those inside it. What concerns a result that is kept
(`output.path`, `output.hub`, `evaluate`) is passed over: this one is only read by the recipe around it. In what a lock
and a model card say of a recipe, files have become recipes written there, so that nothing else is needed to run it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Document, Place
from mergetool.recipe.schema import ModelReference, Output, Recipe, expanded

MOST = 100
"""Recipes inside a recipe, those inside others counted each time they are named."""
_DEEPEST = 20
_STORAGE = ("dtype", "keep_float32")
_OF_A_KEPT_RESULT = ("version", "name", "evaluate", "output")


@dataclass(frozen=True)
class Around:
    """The recipes that a recipe is inside of: their files, from the outermost on."""

    files: tuple[Path, ...] = ()
    known: dict[Path, Recipe] = field(default_factory=dict)
    """What was read already, by file."""

    def inside(self, file: Path) -> "Around":
        return Around((*self.files, file.resolve()), self.known)


Check = Callable[[Document, Around], Recipe]
Read = Callable[[Path], Document]


@dataclass
class _Part(Document):
    """A recipe written inside another one; messages point to where it stands there."""

    written: Document = field(default_factory=lambda: Document("", None))
    place: Place = ()

    def where(self, place: Place) -> str:
        return self.written.where((*self.place, *place))


@dataclass(frozen=True)
class Inside:
    """Reads and checks the recipes inside one recipe; `problems` gets what is wrong with them."""

    document: Document
    around: Around
    read: Read
    check: Check
    problems: list[RecipeError]

    def all(self, given: Mapping[str, Any]) -> dict[str, Recipe]:
        """The recipe of every model that one makes, by the model's name."""
        models = given.get("models") or {}
        references: dict[Place, ModelReference] = {("base",): given["base"]} if "base" in given else {}
        references |= {("models", name): each for name, each in models.items()}
        for place in (place for place, each in references.items() if each.folder is not None and each.recipe is None):
            what = "only a recipe written here has paths that could be relative to it, so this would have no effect"
            self.problems.append(self.document.error((*place, "folder"), what, "remove `folder`"))
        asked = {place: each for place, each in references.items() if each.recipe is not None}
        recipes = {str(place[-1]): self._one(place, reference) for place, reference in asked.items()}
        if sum(1 + count(each) for each in recipes.values() if each is not None) > MOST:
            what = f"more than {MOST} recipes are inside each other"
            self.problems.append(self.document.error((), what, "run some of them first, and name their results"))
        return {name: each for name, each in recipes.items() if each is not None}

    def _one(self, place: Place, reference: ModelReference) -> Recipe | None:
        for key in ("source", "select"):
            if key in self._node(place):
                what = f"a recipe makes the whole model, so `{key}` cannot go with it"
                self.problems.append(self.document.error((*place, key), what, f"remove `{key}`, or `recipe`"))
        try:
            recipe = self._of_file(place, reference) if isinstance(reference.recipe, str) else self._written(place)
        except RecipeError as error:
            self.problems.extend(each for each in error.problems if str(each) not in map(str, self.problems))
            return None
        self.problems.extend(self._refusals((*place, "recipe"), recipe, reference))
        return replace(recipe, output=_output(recipe), evaluate=(), intermediate=True)

    def _node(self, place: Place) -> Any:
        """What is written at a place."""
        node: Any = self.document.data
        for key in place:
            node = node[key]
        return node

    def _of_file(self, place: Place, reference: ModelReference) -> Recipe:
        assert isinstance(reference.recipe, str)
        if reference.folder is not None:
            what = "paths in a recipe's file are relative to that file, so this would have no effect"
            raise self.document.error((*place, "folder"), what, "remove `folder`")
        place = (*place, "recipe")
        path = self.document.folder / expanded(reference.recipe)
        known, file, files = path.absolute(), path.resolve(), self.around.files
        if file in files:
            chain = " -> ".join(each.name for each in (*files[files.index(file) :], file))
            raise self.document.error(place, f"the recipe needs its own result: {chain}", "name another recipe")
        if len(files) > _DEEPEST:
            what = f"recipes are inside each other more than {_DEEPEST} deep"
            raise self.document.error(place, what, "run some of them first, and name their results")
        if not path.is_file():
            raise self.document.error(place, f"there is no file {path}", "check the path")
        if known not in self.around.known:
            self.around.known[known] = self.check(self.read(path), self.around.inside(path))
        return self.around.known[known]

    def _written(self, place: Place) -> Recipe:
        node = self._node(place)
        folder = self.document.folder / expanded(node.get("folder") or "")
        place = (*place, "recipe")
        part = _Part(self.document.name, node["recipe"], folder=folder, written=self.document, place=place)
        return self.check(part, self.around)

    def _refusals(self, place: Place, recipe: Recipe, reference: ModelReference) -> Iterator[RecipeError]:
        """What cannot be made on the way, or not be used so."""
        name = recipe.method.method_name()
        path = reference.recipe if isinstance(reference.recipe, str) else "INNER.yaml"
        if place[0] == "base" and self.document.data["merge"].get("base") == "reference":
            what = "the bundle would refer to a base that is gone when it is finished"
            yield self.document.error(place, what, "write merge: {base: copy}")
        elif recipe.method.searches:
            what = f"{name} is a search, which is a run of its own"
            yield self.document.error(
                place, what, f"run it first, then name its result: mergetool run {path} -o FOLDER"
            )
        elif recipe.points:
            what = "a sweep makes several models, and here is one"
            yield self.document.error(place, what, "remove `sweep` in it, and sweep here")
        elif recipe.method.result != "checkpoint":
            what = f"{name} makes a bundle of several experts, which is not one model"
            fix = (
                f"run it first (mergetool run {path} -o FOLDER), then name an expert: {{source: FOLDER, select: TASK}}"
            )
            yield self.document.error(place, what, fix)
        elif recipe.result == "adapter":
            what = "an adapter is not a model by itself"
            yield self.document.error(place, what, "write output: {kind: checkpoint} in it")


def count(recipe: Recipe) -> int:
    """How many recipes are inside a recipe, at all depths."""
    return sum(1 + count(each) for each in recipe.inner.values())


def _output(recipe: Recipe) -> Output:
    """How an intermediate result is stored: as its recipe says, but in one place and as it suits us."""
    told = recipe.output.model_fields_set & set(_STORAGE)
    return Output.model_validate({key: getattr(recipe.output, key) for key in told})


def inlined(document: Document, inner: Mapping[str, Recipe]) -> dict[str, Any]:
    """A recipe's data with the recipes inside it written out."""
    data: dict[str, Any] = dict(document.data)
    for name, recipe in inner.items():
        holder = data if name == "base" else dict(data["models"])
        holder[name] = {**holder[name], "recipe": _bare(recipe.document), **_folder(recipe, document.folder.absolute())}
        data |= holder if name == "base" else {"models": holder}
    return data


def _folder(recipe: Recipe, around: Path) -> dict[str, str]:
    """What an inner recipe's paths are relative to, where that is not what the outer's are relative to."""
    where = os.path.relpath(recipe.folder, around)
    return {} if where == "." else {"folder": where}


def _bare(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data without what concerns a result that is kept."""
    kept = {key: value for key, value in document.items() if key not in _OF_A_KEPT_RESULT}
    output = {key: value for key, value in dict(document.get("output") or {}).items() if key in _STORAGE}
    return kept | ({"output": output} if output else {})
