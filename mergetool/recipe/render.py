"""pydantic's findings in words for people: the place that was written, what is wrong there, and what to write."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergetool.errors import RecipeError
from mergetool.methods import registry
from mergetool.methods.base import Schedulable, is_method
from mergetool.methods.values import asks_to_recover
from mergetool.recipe.document import Document, Place
from mergetool.recipe.schema import ModelReference


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the nearest of the known names, or nothing. Capitals and underscores do not count."""
    plain = {re.sub(r"[\s_]+", "-", each.lower()): each for each in known}
    near = [plain[each] for each in get_close_matches(re.sub(r"[\s_]+", "-", name.lower()), plain, n=1, cutoff=0.6)]
    return f"did you mean {near[0]!r}?" if near else ""


def render(document: Document, prefix: Place, error: ValidationError, kind: Any) -> list[RecipeError]:
    """pydantic's findings as ours: union tags dropped from the path, words for people, did-you-mean."""
    errors = []
    details = error.errors(include_url=False)
    nested = [detail["loc"] for detail in details]
    for detail in details:
        loc = detail["loc"]
        if detail["type"] == "too_short" and any(other[: len(loc)] == loc and other != loc for other in nested):
            continue
        place = _written(document, (*prefix, *loc), detail["type"])
        if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            errors.append(unknown_key(document, place, _known_keys(kind, loc)))
        else:
            what, fix = _words(detail)
            errors.append(document.error(place, what, _for_a_list(document, kind, detail) or fix))
    return errors


def _for_a_list(document: Document, kind: Any, detail: ErrorDetails) -> str | None:
    """What to write instead of a list of numbers, where one number may stand or several along depth."""
    values, loc = detail["input"], detail["loc"]
    if not isinstance(values, list) or len(values) < 2 or not all(type(value) in (int, float) for value in values):
        return None
    schedulable = _schedulable(document, kind, loc)
    if schedulable is None:
        return None
    along = f"write {{gradient: {values}}} for values along depth"
    models = list(document.data.get("models") or ())
    if not schedulable.per_model or len(models) != len(values) or any(name in loc for name in models):
        return along
    each = ", ".join(f"{name}: {value}" for name, value in zip(models, values, strict=True))
    return f"{along}, or {{{each}}} for one value a model"


def _schedulable(document: Document, kind: Any, loc: Sequence[str | int]) -> Schedulable | None:
    """The mark of the number that a finding is about: of a method, of an override, or of a method inside another."""
    for key in loc:
        fields: Mapping[Any, FieldInfo] = getattr(kind, "model_fields", {})
        if key not in fields:
            continue
        if marks := [mark for mark in fields[key].metadata if isinstance(mark, Schedulable)]:
            return marks[0]
        held = document.data["merge"].get(key)
        kind = registry().get(str(held.get("method"))) if isinstance(held, dict) else None
    return None


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


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _known_keys(kind: Any, loc: tuple[str | int, ...]) -> list[str]:
    """Keys that are known where an unknown one was found: at the end of `loc`, inside a section, method or model."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return list(ModelReference.model_fields)
    fields: Mapping[str, FieldInfo] = kind.model_fields
    for part in loc[:-1]:
        if part in fields:
            annotation = fields[str(part)].annotation
            inside = [each for each in (annotation, *get_args(annotation)) if _is_section(each)]
            if not inside:
                return ["gradient"]
            fields = inside[0].model_fields
    return [*fields, *(["overrides"] if is_method(kind) and len(loc) == 1 else [])]


def unknown_key(document: Document, place: Place, known: Sequence[str]) -> RecipeError:
    """The error for a key that is not known here, with the nearest known one."""
    fix = suggestion(str(place[-1]), known) or f"known keys: {', '.join(known)}"
    return document.error(place, f"unknown key {str(place[-1])!r}", fix)


_EXPECTED = {
    "float_type": ("a number", "write a number"),
    "int_type": ("a whole number", "write a whole number"),
    "bool_type": ("true or false", "write true or false"),
    "string_pattern_mismatch": ("characters that a path can hold", "write another path"),
    "string_unicode": ("Unicode text", "rename the file or folder, or name it from inside"),
    "string_type": ("text", "write text, in quotes if it looks like a number"),
    "tuple_type": ("a list", "write [...]"),
    "dict_type": ("a mapping", "write it as `key: value`"),
    "model_type": ("a mapping", "write it as `key: value`"),
    "dataclass_type": ("a mapping", "write it as `key: value`"),
    "union_tag_invalid": ("a number or {gradient: [...]}", "write one number, or {gradient: [...]}"),
}
"""pydantic's kind of finding -> what was expected, and what to write."""


_NOTHING_TO_RECOVER = (
    "there is no length to recover: this method adds task vectors up or averages them, and made longer, such merges "
    "got worse where it was measured"
)


def _words(detail: ErrorDetails) -> tuple[str, str]:
    """(what, fix) for one pydantic finding."""
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    if kind in _EXPECTED and asks_to_recover(value) and "scale" in detail["loc"]:
        return _NOTHING_TO_RECOVER, "write a number, such as 1.0"
    if kind in _EXPECTED:
        expected, fix = _EXPECTED[kind]
        if context.get("class_name") == ModelReference.__name__:
            expected, fix = "a path or a mapping with `source`", "write the path of a folder or .safetensors file"
        if isinstance(value, str) and "number" in expected:
            fix = f"{fix}; only a scale can be counted" if asks_to_recover(value) else "write the number without quotes"
            return f"expected {expected}, found the text {shown}", fix
        return f"expected {expected}, found {shown}", fix
    if kind == "finite_number":
        return f"{shown} is not a finite number", "write a finite number"
    if kind == "missing":
        return "this key is required", f"add {detail['loc'][-1]}:"
    if kind in ("too_short", "string_too_short"):
        least = context["min_length"]
        return f"needs at least {least} {_ITEMS[kind, least > 1]}, found {shown}", "write more"
    if kind == "literal_error":
        return _not_one_of(value, shown, str(context.get("expected", "")))
    if kind == "value_error" and isinstance(value, dict) and value.get("method") not in (None, *registry()):
        name = str(value["method"])
        return f"there is no method {name!r}", suggestion(name, registry()) or "see: mergetool methods"
    if kind == "value_error":
        return f"{context.get('error', detail['msg'])}, found {shown}", "see: mergetool schema"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{message.replace('input should', 'must')} (found {shown})", "see: mergetool schema"


_ITEMS = {
    ("too_short", False): "entry",
    ("too_short", True): "entries",
    ("string_too_short", False): "character",
    ("string_too_short", True): "characters",
}


DTYPE_WORDS = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single", "float32"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double", "float64"), "float64"),
}
"""What people call a dtype -> its name in a recipe."""


def _not_one_of(value: Any, shown: str, listed: str) -> tuple[str, str]:
    """For a value that is none of the literals that pydantic lists."""
    literals = listed.replace(" or ", ", ").split(", ")
    expected = [literal.strip("'") for literal in literals]
    meant = DTYPE_WORDS.get(str(value).removeprefix("torch.").lower())
    if set(expected) & {"float32", "bfloat16"} and meant is not None:
        fix = f"write {meant}" if meant in expected else f"write {expected[0]}"
        return f"{shown} is not one of {', '.join(expected)}", fix
    if str(value) in literals:
        return f"expected the number {value}, found the text {shown}", "write the number without quotes"
    return f"{shown} is not one of {', '.join(expected)}", suggestion(str(value), expected) or f"write {expected[0]}"
