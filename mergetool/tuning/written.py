"""Recipes that a search writes: they run from where they lie, whatever folder the command is given in.

Relative paths lead to the same places as before. Each has an output of its own, beside the file: the place where the
search wrote its winner is taken.
"""

import os
from pathlib import Path
from typing import Any

from mergetool.planning.sources import is_on_hub
from mergetool.recipe.adapters import over
from mergetool.recipe.load import load_recipe
from mergetool.recipe.schema import Recipe
from mergetool.tensors.writer import write_file


def write_recipe(path: Path, recipe: Recipe, output: str) -> str:
    """Write a recipe's data into a file, with its result beside it under the name `output`. Returns the text."""
    import yaml

    path.parent.mkdir(exist_ok=True)
    data = moved(recipe, path.parent)
    data["output"] = {**data.get("output", {}), "path": output}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    write_file(path, text)
    return str(text)


def parent_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe that gives one of the models itself (or the base), stored as the search's result is."""
    written = recipe.document
    is_base = name == "base" and recipe.base is not None
    source = written["base"] if is_base else over(written.get("base"), written["models"][name])
    data: dict[str, Any] = {
        "models": {"the-base" if is_base else name: source},
        "merge": {"method": "passthrough"},
    }
    output = {key: value for key, value in recipe.document.get("output", {}).items() if key not in ("path", "hub")}
    return load_recipe(data | ({"output": output} if output else {}), folder=recipe.folder)


def moved(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """A recipe's data as it must be written in a file in `folder`: relative paths lead to the same places."""
    here = folder.resolve()

    def there(text: str) -> str:
        if Path(text).is_absolute() or text.startswith("~") or is_on_hub(recipe.folder, text):
            return text
        path = recipe.path_of(text)
        return os.path.relpath(path.parent.resolve() / path.name, here)  # `..` does not lead back through a link

    def reference(value: Any) -> Any:
        if isinstance(value, str):
            return there(value)
        moved = {**value, **{key: there(value[key]) for key in ("source", "adapter") if key in value}}
        if "adapters" in value:
            moved["adapters"] = [there(path) for path in value["adapters"]]
        if "recipe" in value:
            moved["folder"] = os.path.relpath(recipe.path_of(value.get("folder") or ".").resolve(), here)
        if isinstance(value.get("head"), dict):
            moved["head"] = {**value["head"], "weights": there(value["head"]["weights"])}
        return moved

    data = dict(recipe.document)
    if "base" in data:
        data["base"] = reference(data["base"])
    data["models"] = {name: reference(value) for name, value in data["models"].items()}
    if "output" in data and data["output"].get("path"):
        data["output"] = {**data["output"], "path": there(data["output"]["path"])}
    return data
