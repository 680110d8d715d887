"""Our YAML for a converted recipe, with paths that are right from where it will be."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from mergetool.errors import RecipeError
from mergetool.recipe.document import parse_value
from mergetool.recipe.mergekit.roster import is_there
from mergetool.recipe.schema import expanded
from mergetool.recipe.words import is_place


def as_text(data: Mapping[str, Any], folder: Path, name: str | None = None, names: Collection[str] = ()) -> str:
    """A converted recipe as YAML, the base in front, for a file in `folder`.

    Of several documents each has its `name`; `names` are those of all, and no paths.
    """
    out: dict[str, Any] = {} if name is None else {"name": name}
    out |= {"base": _moved(data["base"], folder, names)} if "base" in data else {}
    out["models"] = {name: _moved(reference, folder, names) for name, reference in data["models"].items()}
    out |= {key: value for key, value in data.items() if key not in out}
    if is_place(str(out.get("tokenizer", {}).get("source", ""))):
        out["tokenizer"] = {**out["tokenizer"], "source": _moved(out["tokenizer"]["source"], folder, names)}
    return yaml.dump(out, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _moved(reference: Any, folder: Path, names: Collection[str]) -> Any:
    """A reference with the paths in it seen from another folder; ids of the Hub stay as they are."""
    if isinstance(reference, dict):
        return {key: _moved(value, folder, names) if key in _PATHS else value for key, value in reference.items()}
    if isinstance(reference, list):
        return [_moved(each, folder, names) for each in reference]
    if not isinstance(reference, str) or reference in names or not (reference.startswith(".") or is_there(reference)):
        return reference
    target = expanded(reference)
    if target.is_absolute():
        return reference
    seen = os.path.relpath(target, folder)
    return seen if seen.startswith(".") or not reference.startswith(".") else f"./{seen}"


_PATHS = ("source", "adapter", "adapters", "weights", "head")


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flow = all(isinstance(item, int | float) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Quoted where our reader, whose rules are those of YAML 1.2, would take it for something else."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _reads_as_text(text) else '"')


def _reads_as_text(text: str) -> bool:
    try:
        return bool(parse_value(text) == text)
    except RecipeError:
        return True  # which the dumper quotes by itself


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)
