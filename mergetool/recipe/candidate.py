"""Candidates of a search: recipes with another `merge` section, told apart by a few numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergetool.errors import RecipeError
from mergetool.layouts import registry
from mergetool.layouts.base import Layout
from mergetool.methods.base import Method, expect
from mergetool.methods.families.search import SearchMethod
from mergetool.recipe.document import Document, Place
from mergetool.recipe.schema import Override, Recipe
from mergetool.recipe.section import merge_section, override_class

if TYPE_CHECKING:
    from mergetool.search.space import Value
    from mergetool.tensors.source import ModelSource


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
    return [_other(document, {"merge": section}) for section in method.tried(tuple(models))]


def _other(document: Document, sections: Mapping[str, Any]) -> OtherDocument:
    data = {key: value for key, value in document.data.items() if key != "evaluate"} | dict(sections)
    return OtherDocument(document.name, data, folder=document.folder, written=document)


def settled(recipe: Recipe, sources: "Mapping[str, ModelSource]") -> Recipe:
    """A search whose method knows what the headers of these models tell. Raises PlanError."""
    return replace(recipe, method=expect(recipe.method, SearchMethod).settled(sources))


def settings_of(recipe: Recipe, values: "Sequence[Value]") -> dict[str, Any]:
    """The sections of one candidate that tell it from others: `merge`, and where its layers come from."""
    method, models = expect(recipe.method, SearchMethod), tuple(recipe.models)
    return {"merge": method.candidate(tuple(values), models), **method.arranged(tuple(values), models)}


def candidate_recipe(recipe: Recipe, values: "Sequence[Value]") -> Recipe:
    """The plain recipe of one candidate. Raises RecipeError where these numbers cannot go together.

    Only the method is made anew: all else was checked when the recipe was loaded.
    """
    sections = settings_of(recipe, values)
    document = _other(Document(recipe.name, recipe.document, folder=recipe.folder), sections)
    problems: list[RecipeError] = []
    _, method, overrides = merge_section(document, problems)
    if problems or method is None:
        raise RecipeError.of(problems)
    made = replace(recipe, method=method, overrides=overrides, document=document.data, evaluate=())
    del sections["merge"]
    return _arranged(made, sections) if sections else made


def _arranged(recipe: Recipe, sections: Mapping[str, Any]) -> Recipe:
    """A recipe whose layers come from where these sections say."""
    layout: Layout = registry()[next(iter(sections))].model_validate(sections)
    override: type[Override] = override_class(type(recipe.method))
    own = tuple(override.model_validate(data) for _, data in layout.overrides())
    return replace(recipe, layout=layout, layout_overrides=own)


def plain_recipe(recipe: Recipe, values: "Sequence[Value]") -> Recipe:
    """The recipe of one candidate as it is written down: without models from which nothing is taken."""
    return _without_idle(candidate_recipe(recipe, values))


def _without_idle(recipe: Recipe) -> Recipe:
    idle = set(recipe.models) - set(recipe.layout.taking(tuple(recipe.models)))
    if not idle:
        return recipe
    kept = {name: each for name, each in recipe.document["models"].items() if name not in idle}
    return replace(
        recipe,
        models={name: each for name, each in recipe.models.items() if name not in idle},
        inner={name: each for name, each in recipe.inner.items() if name not in idle},
        document={**recipe.document, "models": kept},
    )


def first_candidate(recipe: Recipe) -> Recipe:
    """The plain recipe where a search starts."""
    return candidate_recipe(recipe, expect(recipe.method, SearchMethod).space(tuple(recipe.models)).start)
