"""The recipe: what was asked, checked strictly, with every error at its line and column."""

from mergetool.recipe.load import load_recipe
from mergetool.recipe.model import Recipe

__all__ = ["Recipe", "load_recipe"]
