"""What papers and people call what is here: methods found by a word, and names of what is written otherwise."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.recipe.documentation import summary


def known_as() -> tuple[dict[str, Any], ...]:
    """Entries of what has another name here: `names`, what to `write`, and the `recipe` that shows it."""
    return tuple(each for each in _entries() if "recipe" in each)


def not_here() -> tuple[dict[str, Any], ...]:
    """Entries of what is not done here: `names`, `why`, and what to do `instead`."""
    return tuple(each for each in _entries() if "why" in each)


@cache
def _entries() -> tuple[dict[str, Any], ...]:
    return tuple(yaml.safe_load((files("mergetool.recipe") / "known_as.yaml").read_text("utf-8")))


def find(word: str) -> list[dict[str, str]]:
    """What is called so, or mentions it in its documentation. Raises RecipeError where nothing does."""
    sought = _plain(word)
    others = [_other(each) for each in _entries() if any(sought in _plain(name) for name in each["names"])]
    methods = [
        {"name": name, "write": summary(kind), "recipe": f"recipes/{name}.yaml"}
        for name, kind in registry().items()
        if sought in _plain(f"{name} {kind.documentation()}")
    ]
    if not methods + others:
        raise RecipeError(f"nothing here is known as {word!r}", "methods --find", "see: mergetool methods")
    return others + methods


def _other(entry: dict[str, Any]) -> dict[str, str]:
    name = ", ".join(entry["names"])
    if "why" in entry:
        return {"name": name, "write": f"not here ({entry['why']}); instead: {entry['instead']}", "recipe": ""}
    return {"name": name, "write": entry["write"], "recipe": f"recipes/{entry['recipe']}.yaml"}


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").replace("_", " ").split())
