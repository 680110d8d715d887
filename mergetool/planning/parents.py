"""Whether the models of a recipe belong together, and whether each of them takes part: errors and loud words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mergetool.checkpoints.facts import disagreements, name_of
from mergetool.checkpoints.quantised import file_about_codes, is_raw_float8
from mergetool.checkpoints.vocabulary import chat_template_of, disagreement, end_tokens, more_tokens, tokens_of
from mergetool.errors import PlanError
from mergetool.layouts.base import Origin
from mergetool.planning.graph import BASE, Step
from mergetool.recipe.schema import Recipe
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

Sources = Mapping[str, ModelSource]

_MAX_LISTED = 8
_MAX_WEIGHT = 10.0
"""Larger weights are taken for percents, or for slips."""


def label(model: str) -> str:
    """What messages call a model."""
    return "the base" if model == BASE else f"model {model!r}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and whether there are more."""
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")


def check_missing(
    recipe: Recipe, sources: Sources, origins: Sequence[Origin], copied: Callable[[Origin], bool]
) -> None:
    """Raise PlanError for a model that lacks tensors it should have, unless the recipe says what to do about that.

    Tensors that an override copies from another model (`copied`) may be missing. What is advised has been thought
    through: where a model has little in common with the others, filling up would only hide that.
    """
    if recipe.check.missing != "error":
        return
    leader = BASE if BASE in sources else next(iter(recipe.models))
    for model in recipe.models:
        wanted = [each for each in origins if model in each.models]
        missing = [each.name for each in wanted if model not in each.tensors and not copied(each)]
        if not missing:
            continue
        shared = [each for each in wanted if model in each.tensors]
        other = "base" if leader == BASE else "another model"
        if 2 * len(shared) < min(len(wanted), len(sources[model].specs)):  # a part of the network may be all there is
            kinds = _kinds(sources, model, leader)
            fix = "merge models of one network; `mergetool inspect` lists what each of them holds"
            what = f"model {model!r} has only {len(shared)} of the {len(wanted)} tensors that {other} has{kinds}"
            raise PlanError(f"{what}; it lacks {listed(missing)}", f"model {model!r}", fix)
        fix = "set check.missing: base or skip" if leader == BASE else "set check.missing: skip"
        what = f"model {model!r} lacks {len(missing)} tensors that {other} has: {listed(missing)}"
        raise PlanError(what, f"model {model!r}", f"{fix}, or copy them with an override `use`")


def _kinds(sources: Sources, model: str, leader: str) -> str:
    """What two models are, where their configs tell and they are not the same."""
    mine, theirs = (name_of(read_config(sources[each].folder)) for each in (model, leader))
    return f": it is a {mine}, {label(leader)} a {theirs}" if mine and theirs and mine != theirs else ""


def check_shares(recipe: Recipe, sources: Sources, steps: Sequence[Step]) -> list[str]:
    """Words about models with less than half of what is merged. Raises PlanError for one that has no part in it.

    Tensors that an override copies were asked for so, and are not counted.
    """
    words = []
    merged = [step for step in steps if step.operation.arithmetic]
    total = sum(step.spec.num_elements for step in merged)
    for model in recipe.models:
        part = [step for step in merged if model in step.reads]
        size = sum(step.spec.num_elements for step in part)
        if not any(model in step.reads or step.name in sources[model].specs for step in steps):
            what = f"model {model!r} contributes to no tensor: it has none of those that are written"
            raise PlanError(what, f"model {model!r}", "remove it, or check that it is the model you meant")
        if part and 2 * size < total:
            what = f"model {model!r} contributes to {len(part)} of {len(merged)} merged tensors only"
            absent = [step.name for step in merged if model not in step.reads]
            words.append(f"{what} ({size / total:.0%} of the parameters); not to {listed(absent)}")
    return words


def words_about(
    recipe: Recipe, sources: Sources, leader: str, steps: Sequence[Step], *, stacked: bool = False
) -> Iterator[str]:
    """What people should know about their models before they merge them. Raises PlanError for heads cut differently.

    `stacked`: layers of several models work together, though they are copied.
    """
    configs = {model: read_config(source.folder) for model, source in sources.items()}
    if not recipe.method.arranges:
        yield from _same_files(sources)
    for model in recipe.models:
        used = [step for step in steps if model in step.reads] if model != leader else []
        merged = any(step.operation.arithmetic for step in used)
        if merged or (stacked and used):
            yield from _facts(model, leader, configs)
        if merged:
            yield from _tokens(recipe, sources, model, leader)
    if recipe.tokenizer is None:
        yield from _left_behind(recipe, sources, leader, configs)
    yield from _large_weights(steps)
    for model, source in sources.items():
        if file := file_about_codes(source):
            yield f"{label(model)} has a {file}, though its weights are plain numbers: they are merged as they are"
    if any(is_raw_float8(source) for source in sources.values()):
        yield (
            "weights in 8-bit floats without scales are merged as the numbers they are; if they were quantised with "
            "scales kept elsewhere, dequantise them first"
        )


def _same_files(sources: Sources) -> Iterator[str]:
    """Models that are one and the same file."""
    seen: dict[tuple[str, ...], str] = {}
    for model, source in sources.items():
        files = tuple(sorted(str(stamp.path.resolve()) for stamp in source.files))
        if files and files in seen:
            consequence = "its task vector is zero" if seen[files] == BASE else "it counts twice"
            yield f"model {model!r} is the same as {label(seen[files])}: {consequence}"
        seen.setdefault(files, model)


def _facts(model: str, leader: str, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    differing = disagreements(configs[leader], configs[model])
    told = [f"{each.key} is {each.values[0]!r} and {each.values[1]!r}" for each in differing]
    if any(each.cuts_heads for each in differing):
        raise PlanError(
            f"config.json of {label(leader)} and {label(model)} disagree: {'; '.join(told)}; "
            "their weights are cut into heads differently, so a mean of them is nothing",
            f"model {model!r}",
            "merge models of one architecture; if one config.json is wrong, correct it",
        )
    if told:
        yield f"config.json of {label(leader)} and {label(model)} disagree, and the first is kept: {'; '.join(told)}"


def _tokens(recipe: Recipe, sources: Sources, model: str, leader: str) -> Iterator[str]:
    what = disagreement(sources[leader].folder, sources[model].folder)
    if what is not None and not all(tokens_of(sources[each].folder) for each in (model, leader)):
        yield (
            f"the tokenizers of {label(leader)} and {label(model)} differ: {what}, in a format that is not read here; "
            "rows are merged by number all the same, so save both tokenizers with save_pretrained (tokenizer.json)"
        )
    mine, theirs = (_labels(read_config(sources[each].folder)) for each in (model, leader))
    if mine and theirs and mine != theirs and len(mine) == len(theirs):
        place = next(place for place in range(len(mine)) if mine[place] != theirs[place])
        yield (
            f"id2label of {label(leader)} and {label(model)} disagree: label {place} is {theirs[place]!r} and "
            f"{mine[place]!r}; if their heads are merged, classes are mixed up"
        )


def _labels(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes in order, if they are names at all."""
    labels = config.get("id2label")
    try:
        names = [str(labels[key]) for key in sorted(labels, key=int)] if isinstance(labels, dict) else []
    except ValueError:
        return []
    return [] if all(name == f"LABEL_{place}" for place, name in enumerate(names)) else names


def _left_behind(
    recipe: Recipe, sources: Sources, leader: str, configs: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Chat templates and end tokens that the leader lacks."""
    folder = sources[leader].folder
    template, ends = chat_template_of(folder), end_tokens(folder, configs[leader])
    for model in recipe.models:
        own = chat_template_of(sources[model].folder), end_tokens(sources[model].folder, configs[model])
        chosen = recipe.chat_template is not None
        what = [f"the end token {own[1]}"] if own[1] and ends and own[1] != ends and not chosen else []
        what += ["a chat template"] if own[0] and own[0] != template and not chosen else []
        more = more_tokens(folder, sources[model].folder)
        what += [f"{len(more)} tokens ({listed([repr(token) for token in more])})"] if more else []
        if what and model != leader:
            words = f"{label(model)} has {' and '.join(what)} of its own; the result has those of {label(leader)}"
            yield f"{words}; to take the model's: tokenizer: {{source: {model}}}"
            return


def _large_weights(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        weights = step.operation.numbers.get("weight", ())
        weights = weights if isinstance(weights, tuple) else (weights,)
        large = [value for value in weights if isinstance(value, int | float) and abs(value) > _MAX_WEIGHT]
        if large:
            yield f"a weight of {large[0]:g} can hardly be meant: shares are written 0.3, not 30"
            return
