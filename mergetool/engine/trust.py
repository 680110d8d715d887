"""Recipes are data, and data must not run programs: code that a recipe names is run only if the user says so.

A recipe may come from anywhere (a model card holds one). Most are numbers and names, but a few fields name Python code
to execute. Without the user's word in the command, a run with such a field is refused before anything is opened.
"""

from mergetool.arch.code import code_of
from mergetool.errors import RecipeError
from mergetool.recipe.schema import Recipe


def check_trust(recipe: Recipe, *, trusted: bool) -> None:
    """Raise RecipeError if the recipe would execute code, unless that is `trusted`."""
    for inner in recipe.inner.values():
        check_trust(inner, trusted=trusted)
    named = dict(recipe.method.code())
    if recipe.architecture is not None and code_of(recipe.architecture):
        named["architecture"] = recipe.architecture
    for field, code in named.items():
        if not trusted:
            raise RecipeError(
                f"the recipe would execute Python code on this machine: {code!r}",
                f"{recipe.name}: {field}",
                "read that file; if you trust it, add --trust-code (in Python: trust_code=True)",
            )
