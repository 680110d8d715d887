"""Recipes of the zoo's tests."""

from pathlib import Path
from typing import Any


def recipe_of(base: Path | None, *models: Path, method: str = "task-arithmetic", **more: Any) -> dict[str, Any]:
    """A recipe of these folders, the models called a, b, c; task arithmetic has scale 0.5."""
    numbers = {"scale": 0.5} if method == "task-arithmetic" else {}
    recipe: dict[str, Any] = {"models": {name: str(path) for name, path in zip("abc", models, strict=False)}}
    return recipe | ({"base": str(base)} if base else {}) | {"merge": {"method": method, **numbers}, **more}
