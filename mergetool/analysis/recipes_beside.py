"""What recipes, inputs and versions of several results say differently, under dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.methods import registry
from mergetool.outputs.settings_beside import leaves

_OF_A_PLACE = ("output.path", "output.hub", "name", "version")
"""Keys of a recipe that say nothing about the result."""
_SHORT = 12


def differing_settings(locks: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each key that has not the same value in all of them, with a column for each result.

    A field of the method that a recipe leaves out has its default; one number for all models is that of each.
    """
    told = {name: dict(_told(lock)) for name, lock in locks.items()}
    keys = list(dict.fromkeys(key for values in told.values() for key in values))
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):
            continue  # what is inside of it is told
        row = {name: _value(values, locks[name], key) for name, values in told.items()}
        if any(value != next(iter(row.values())) for value in row.values()):
            yield {"key": key, **row}


def _value(told: Mapping[str, Any], lock: Mapping[str, Any], key: str) -> Any:
    """What a result has there, or what holds for all that is inside of what it has."""
    place = key
    while place:
        if place in told:
            return told[place]
        if (default := _default(lock, place)) is not None:
            return default
        place = place.rpartition(".")[0]
    return None


def _told(lock: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(lock["recipe"]):
        if not f"{key}.".startswith(tuple(f"{each}." for each in _OF_A_PLACE)):
            yield key, value
    if "seed" in lock:
        yield "compute.seed", lock["seed"]
    for name, files in lock["inputs"].items():
        yield f"inputs.{name}", " ".join(str(file.get("sha256"))[:_SHORT] for file in files)
    yield from leaves({"versions": {"mergetool": lock.get("mergetool"), **lock.get("versions", {})}})


def _default(lock: Mapping[str, Any], key: str) -> Any:
    """What a method takes for a field that the recipe leaves out."""
    kind = registry().get(str(lock["recipe"].get("merge", {}).get("method")))
    section, _, name = key.partition(".")
    field = None if kind is None or section != "merge" else kind.model_fields.get(name)
    return None if field is None or field.is_required() else field.get_default(call_default_factory=True)
