"""Candidates of a search: recipes with another `merge` section, told apart by a few numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergetool.errors import RecipeError
from mergetool.methods.base import Method, expect
from mergetool.methods.families.search import SearchMethod
from mergetool.recipe.document import Document, Place
from mergetool.recipe.schema import Recipe
from mergetool.recipe.section import merge_section

if TYPE_CHECKING:
    from mergetool.search.space import Value


@dataclass
class OtherDocument(Document):
    """A recipe as if `merge` had been written with plain numbers; messages point to where `merge.inner` was."""

    written: Document = field(default_factory=lambda: Document("", None))

    def where(self, place: Place) -> str:
        return self.written.where(("merge", "inner", *place[1:]) if place[:1] == ("merge",) else place)


def other_documents(document: Document, method: Method) -> list[OtherDocument]:
    """The recipes that a method will try, so that they can be checked before the first is tried."""
    models = document.data.get("models")
    if not isinstance(models, dict):
        return []  # which will be said
    return [_other(document, section) for section in method.tried(tuple(models))]


def _other(document: Document, section: Mapping[str, Any]) -> OtherDocument:
    data = {key: value for key, value in document.data.items() if key != "evaluate"} | {"merge": dict(section)}
    return OtherDocument(document.name, data, folder=document.folder, written=document)


def settings_of(recipe: Recipe, values: "Sequence[Value]") -> dict[str, Any]:
    """The `merge` section of one candidate."""
    return expect(recipe.method, SearchMethod).candidate(tuple(values), tuple(recipe.models))


def candidate_recipe(recipe: Recipe, values: "Sequence[Value]") -> Recipe:
    """The plain recipe of one candidate. Raises RecipeError where these numbers cannot go together.

    Only the method is made anew: all else was checked when the recipe was loaded.
    """
    section = settings_of(recipe, values)
    document = _other(Document(recipe.name, recipe.document, folder=recipe.folder), section)
    problems: list[RecipeError] = []
    _, method, overrides = merge_section(document, problems)
    if problems or method is None:
        raise RecipeError.of(problems)
    return replace(recipe, method=method, overrides=overrides, document=document.data, evaluate=())


def first_candidate(recipe: Recipe) -> Recipe:
    """The plain recipe where a search starts."""
    return candidate_recipe(recipe, expect(recipe.method, SearchMethod).space(tuple(recipe.models)).start)
