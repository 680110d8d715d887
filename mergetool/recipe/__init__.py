"""The recipe: what was asked, checked strictly, with every error at its line and column."""

from mergetool.recipe.load import load_recipe
from mergetool.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
