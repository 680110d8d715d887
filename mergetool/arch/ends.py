"""Which tensors a network begins with and which it ends with, as the files in `data` list them around the layers."""

import re
from collections.abc import Mapping
from typing import Literal

from mergetool.arch.bind import any_prefix
from mergetool.arch.language import ArchFamily, pattern
from mergetool.arch.match import families, recognise


def ends_of(shapes: Mapping[str, tuple[int, ...]], model_type: str = "") -> dict[str, Literal["first", "last"]]:
    """The end of every tensor outside the layers, of a known architecture whose layers are numbered; else nothing."""
    family = families().get(recognise(shapes, {"model_type": model_type}) or "")
    if family is None or not family.layers:
        return {}
    forms = list(family.tensors)
    begin = next((n for n, each in enumerate(forms) if _in_layers(family, each)), len(forms))
    first, last = (_patterns(family, part) for part in (forms[:begin], forms[begin:]))
    ends: dict[str, Literal["first", "last"]] = {}
    for name in shapes:
        if any(each.fullmatch(name) for each in first):
            ends[name] = "first"
        elif any(each.fullmatch(name) for each in last):
            ends[name] = "last"
    return ends


def _in_layers(family: ArchFamily, form: str) -> bool:
    return any(form.startswith(layer) for layer in family.layers)


def _patterns(family: ArchFamily, forms: list[str]) -> list[re.Pattern[str]]:
    prefix = any_prefix(family)
    return [re.compile(prefix + pattern(each).pattern) for each in forms if not _in_layers(family, each)]
