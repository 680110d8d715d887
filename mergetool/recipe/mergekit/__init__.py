"""mergekit recipes, taken as they are."""

from mergetool.recipe.mergekit.convert import convert, is_mergekit
from mergetool.recipe.mergekit.written import as_text

__all__ = ["as_text", "convert", "is_mergekit"]
