"""pydantic's findings in words for people: the place that was written, what is wrong there, and what to write."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mergetool.errors import RecipeError
from mergetool.methods.base import Method
from mergetool.recipe.document import Document, Place
from mergetool.recipe.model import ModelReference, Section


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest of the known names, or nothing."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def render(document: Document, prefix: Place, error: ValidationError, kind: Any) -> list[RecipeError]:
    """pydantic's findings as ours: union tags dropped from the path, words for people, did-you-mean."""
    found = []
    details = error.errors(include_url=False)
    nested = [detail["loc"] for detail in details]
    for detail in details:
        loc = detail["loc"]
        if detail["type"] == "too_short" and any(other[: len(loc)] == loc and other != loc for other in nested):
            continue
        place = _written(document, (*prefix, *loc), detail["type"])
        if detail["type"] == "extra_forbidden":
            found.append(unknown_key(document, place, _known_keys(kind, loc)))
        else:
            found.append(document.error(place, *_words(detail)))
    return found


def _written(document: Document, loc: tuple[str | int, ...], kind: str) -> Place:
    """Drop from a pydantic location what the user did not write (tags of unions)."""
    node = document.data
    place: list[str | int] = []
    for index, part in enumerate(loc):
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node)))
        if inside:
            node = node[part]
            place.append(part)
        elif kind == "missing" and index == len(loc) - 1:
            place.append(part)
    return tuple(place)


def _known_keys(kind: Any, loc: tuple[str | int, ...]) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, Method):
        if len(loc) == 1:
            return [*kind.model_fields, "overrides"]
        section = kind.model_fields[str(loc[0])].annotation
        return list(section.model_fields) if _is_section(section) else ["gradient"]
    if isinstance(kind, type) and issubclass(kind, Section):
        return list(kind.model_fields)
    return list(ModelReference.model_fields)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a field is a mapping with fields of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, Method)


def unknown_key(document: Document, place: Place, known: Sequence[str]) -> RecipeError:
    """The error for a key that is not known here, with the nearest known one."""
    fix = suggestion(str(place[-1]), known) or f"known keys: {', '.join(known)}"
    return document.error(place, f"unknown key {str(place[-1])!r}", fix)


def _words(detail: ErrorDetails) -> tuple[str, str]:
    """(what, fix) for one pydantic finding."""
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    if kind in ("float_type", "int_type", "float_parsing"):
        text = isinstance(value, str)
        what = f"expected a number, found {'the text ' if text else ''}{shown}"
        return what, f"write {'the number without quotes' if text else 'a number'}"
    if kind == "finite_number":
        return f"{shown} is not a finite number", "write a finite number"
    if kind == "missing":
        return "this key is required", f"add {detail['loc'][-1]}:"
    if kind.startswith("bool"):
        return f"expected true or false, found {shown}", "write true or false"
    if kind == "literal_error":
        expected = [part.strip("' ") for part in str(context.get("expected", "")).replace(" or ", ",").split(",")]
        return f"{shown} is not one of {', '.join(expected)}", suggestion(
            str(value), expected
        ) or f"write {expected[0]}"
    if kind == "value_error":
        return f"{context.get('error', detail['msg'])}, found {shown}", "see: mergetool schema"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{message.replace('input should', 'must')} (found {shown})", "see: mergetool schema"
