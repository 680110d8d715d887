"""mergekit recipes, taken as they are."""

from mergetool.recipe.mergekit.convert import convert, converted_text, is_mergekit

__all__ = ["convert", "converted_text", "is_mergekit"]
