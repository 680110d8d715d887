"""The settings of all slices of a mergekit recipe as `merge` and `slices`: what they share, and what is each one's own.

In mergekit every slice resolves its parameters by itself, gradients run along each slice, embeddings follow the first
slice, and the final norm and head the last one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergetool.methods import registry
from mergetool.recipe.mergekit.limits import ByModel
from mergetool.recipe.mergekit.roster import Roster, SliceModels
from mergetool.recipe.mergekit.settings import MethodSettings, has_gradient, plain


def stacked(roster: Roster, settings: Sequence[MethodSettings]) -> dict[str, Any]:
    """`merge`, and `slices` where layers are taken apart, for the groups of a recipe and the settings of each."""
    names = list(roster.names.values())
    merging = [each for each, group in zip(settings, roster.groups, strict=True) if group.merged]
    first = merging[0] if merging else settings[0]
    method = {"method": roster.target.method, **roster.target.constants}
    layers = [_layers(roster, group) for group in roster.groups]
    if roster.whole or _is_shared(roster, merging):
        entries = {"overrides": [plain(each, names) for each in first.overrides]} if first.overrides else {}
        merge = {**method, **plain(_joined(merging), names), **entries}
        return {"merge": merge} if roster.whole else {"slices": layers, "merge": merge}
    common = {key: value for key, value in _joined(merging).items() if not has_gradient(value)}
    needed = [key for key, info in registry()[roster.target.method].model_fields.items() if info.is_required()]
    merge = {**method, **plain({**{key: first.values[key] for key in needed if key in first.values}, **common}, names)}
    slices = [
        _with_settings(place, each, {} if _is_weighed_alone(group, each) else common, names)
        for place, group, each in zip(layers, roster.groups, settings, strict=True)
    ]
    for end in (slices[0], slices[-1]):
        if "set" in end or "overrides" in end:
            end["outside"] = True
    return {"slices": slices, "merge": merge}


def _is_shared(roster: Roster, settings: Sequence[MethodSettings]) -> bool:
    """Whether all slices have the same settings, and none of them would be lost where they stand in `merge`."""
    groups = [group for group in roster.groups if group.merged]
    if any(each.along_depth for each in settings) and (len(roster.groups) > 1 or roster.groups[0].length == 1):
        return False
    if any(map(_is_weighed_alone, groups, settings)):
        return False
    joined = _joined(settings)
    return all(each.values.keys() == joined.keys() and each.overrides == settings[0].overrides for each in settings)


def _joined(settings: Sequence[MethodSettings]) -> dict[str, Any]:
    """The fields on which all slices agree, as far as they have the same models."""
    fields = {}
    for key, first in settings[0].values.items() if settings else ():
        values = [each.values.get(key) for each in settings]
        by_model = [value for value in values if isinstance(value, ByModel)]
        if len(by_model) == len(values):
            together = ByModel()
            numbers = [item for value in by_model for item in value.items()]
            if all(together.setdefault(name, number) == number for name, number in numbers):
                fields[key] = together
        elif all(value == first for value in values):
            fields[key] = first
    return fields


def _is_weighed_alone(group: SliceModels, settings: MethodSettings) -> bool:
    """Whether a slice of one model is more than a copy: a sum of one summand that is not divided by its weight."""
    values = settings.values
    lone = len(group.merged) == 1 and values.get("normalize") is False and group.ancestor is None
    return lone and (bool(settings.overrides) or any(weight != 1 for weight in values["weight"].values()))


def _layers(roster: Roster, group: SliceModels) -> dict[str, Any]:
    """Which layers of which models; the recipe's base among them, another base beside them."""
    spans = {roster.names[each.reference]: list(each.span or ()) for each in group.merged}
    if group.ancestor is None:
        return spans
    own = list(group.ancestor.span or ())
    if roster.is_base_of_recipe(group.ancestor):
        return {**spans, "base": own}
    name = roster.names[group.ancestor.reference]
    return {"layers": spans, "base": {name: own}} if spans else {name: own}


def _with_settings(
    place: Mapping[str, Any], settings: MethodSettings, common: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """A slice in its long form, where it has settings of its own."""
    own = {key: value for key, value in settings.values.items() if key not in common}
    entries = [plain({**each, **own, **each}, names) for each in settings.overrides]
    if not own and not entries:
        return dict(place)
    long = place if "layers" in place else {"layers": dict(place)}
    return {**long, **({"set": plain(own, names)} if own else {}), **({"overrides": entries} if entries else {})}
