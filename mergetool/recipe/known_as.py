"""What papers and people call what is here: methods found by a word, and names of what is written otherwise."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mergetool.errors import RecipeError
from mergetool.recipe.documentation import method_facts


@cache
def known_as() -> tuple[dict[str, Any], ...]:
    """Every entry of known_as.yaml: `names`, what to `write`, and the `recipe` that shows it."""
    return tuple(yaml.safe_load((files("mergetool.recipe") / "known_as.yaml").read_text("utf-8")))


def find(word: str) -> list[dict[str, str]]:
    """What is called so, or mentions it in its documentation. Raises RecipeError where nothing does."""
    sought = _plain(word)
    others = [
        {"name": ", ".join(each["names"]), "write": each["write"], "recipe": f"recipes/{each['recipe']}.yaml"}
        for each in known_as()
        if any(sought in _plain(name) for name in each["names"])
    ]
    methods = [
        {"name": fact["name"], "write": fact["summary"], "recipe": f"recipes/{fact['name']}.yaml"}
        for fact in method_facts()
        if sought in _plain(f"{fact['name']} {fact['documentation']}")
    ]
    if not methods + others:
        raise RecipeError(f"nothing here is known as {word!r}", "methods --find", "see: mergetool methods")
    return others + methods


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").replace("_", " ").split())
