"""What a result will be, seen from its plan: its config.json, and whether its parts fit each other."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetool.checkpoints.ties import is_head
from mergetool.checkpoints.truth import Parent, Written, layer_counts, strange_sizes, true_config, vocabulary_sizes
from mergetool.checkpoints.vocabulary import disagreement, special_ids
from mergetool.errors import PlanError
from mergetool.planning.beside import config_owner, files_beside, tokenizer_owner, words_about_files
from mergetool.planning.chat import made_beside, special_tokens, words_about_chat
from mergetool.planning.graph import Operand, Plan
from mergetool.planning.parents import label
from mergetool.tensors.side_files import CONFIG_NAME, read_config
from mergetool.tensors.writer import write_file


def config_of(plan: Plan) -> dict[str, Any]:
    """The result's config.json; empty where no model has one. Raises PlanError where no config fits what is written."""
    return {**true_config(config_owner(plan), *_facts(plan)), **plan.config}


def write_small_files(plan: Plan, folder: Path, put: Callable[[Path, Path], None]) -> None:
    """config.json as it is true of the result, files that are made, and by `put` all others that belong to it."""
    if config := config_of(plan):
        write_file(folder / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    made = made_beside(plan)
    for name, path in files_beside(plan).items():
        if name not in made:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            put(path, folder / name)
    for name, text in made.items():
        write_file(folder / name, text)


def _facts(plan: Plan) -> tuple[dict[str, Parent], Written]:
    """The models, and what will be written of them."""
    parents = {
        model: Parent(
            read_config(source.folder),
            {name: spec.shape for name, spec in source.specs.items()},
            {name: spec.shape for name, spec in source.described.items()},
        )
        for model, source in plan.sources.items()
    }
    owner, tokenizer = config_owner(plan), tokenizer_owner(plan)
    written = Written(
        shapes=_shapes(plan),
        copied={name: operand.source for name, operand in copies_of(plan).items()},
        layers=plan.layers,
        untied=plan.untied,
        dtype=_main_dtype(plan),
        one_dtype=plan.recipe.output.dtype != "source",
        special={} if tokenizer == owner else special_ids(parents[tokenizer].config),
    )
    return parents, replace(written, special={**written.special, **special_tokens(plan)})


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in plan.specs.items()}


def copies_of(plan: Plan) -> dict[str, Operand]:
    """What is copied as it is, by name of the output tensor."""
    copied = [step for step in plan.steps if not step.operation.arithmetic and step.models]
    return {slot.spec.name: step.models[0] for step in copied for slot in step.slots}


def _main_dtype(plan: Plan) -> str | None:
    """torch name of the floating-point dtype that was asked for, or that most bytes are stored in."""
    if plan.recipe.output.dtype != "source":
        return plan.recipe.output.dtype
    sizes: Counter[str] = Counter()
    for slot in plan.slots:
        if slot.spec.dtype.is_float:
            sizes[slot.spec.dtype.torch_name] += slot.spec.num_bytes
    return sizes.most_common(1)[0][0] if sizes else None


def check_vocabulary(plan: Plan) -> None:
    """Raise PlanError where embeddings and head of the result have another number of rows than each other."""
    shapes = _shapes(plan)
    before = {name: spec.shape for name, spec in plan.sources[plan.template].specs.items()}
    rows = vocabulary_sizes(shapes)
    heads = {name: shape[0] for name, shape in shapes.items() if is_head(name) and len(shape) == 2}
    for head, size in heads.items():
        for name, other in rows.items():
            if size != other and before.get(head, (0,))[0] == before.get(name, (1,))[0]:
                raise PlanError(
                    f"{head} has {size} rows and {name} {other}: one vocabulary in, another one out",
                    "plan",
                    f"take both from one model: overrides: [{{match: {name!r}, use: MODEL}}, "
                    f"{{match: {head!r}, use: MODEL}}], and its tokenizer: tokenizer: {{source: MODEL}}",
                )


def words_about_result(plan: Plan) -> Iterator[str]:
    """What is unusual about the result."""
    shapes = _shapes(plan)
    yield from words_about_files(plan)
    yield from words_about_chat(plan)
    yield from _sizes(plan)
    yield from _layers(plan, shapes)
    yield from _tokens(plan, shapes)


def _sizes(plan: Plan) -> Iterator[str]:
    """Tensors of another size than config.json will speak of. Raises PlanError where it cannot tell the truth."""
    config_of(plan)
    for name, model in strange_sizes(config_owner(plan), *_facts(plan)).items():
        yield f"{name} is of another size in {label(model)}, of which config.json says nothing: the result may not open"


def _tokens(plan: Plan, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Embeddings that are copied from one model, and a tokenizer of another that means something else by their rows."""
    if plan.words.texts is not None:
        return
    owner = tokenizer_owner(plan)
    rows = vocabulary_sizes(shapes)
    for name, operand in copies_of(plan).items():
        if name not in rows or operand.source == owner:
            continue
        other = plan.sources[owner].specs.get(name)
        differs = disagreement(plan.sources[owner].folder, plan.sources[operand.source].folder)
        if other is not None and other.shape[0] != rows[name]:
            differs = differs or f"{other.shape[0]} and {rows[name]} rows"
        if differs:
            yield (
                f"{name} is copied from {label(operand.source)}, the tokenizer from {label(owner)}, and they differ "
                f"({differs}): write tokenizer: {{source: {operand.source}}}"
            )


def _layers(plan: Plan, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    old, new = layer_counts(plan.sources[plan.template].specs), layer_counts(shapes)
    for tower, count in new.items():
        if old.get(tower, count) != count and tower not in plan.layers:
            last = next(step for step in plan.steps if step.name.startswith(f"{tower}.{count - 1}."))
            yield (
                f"the result has {count} layers under {tower}, {label(plan.template)} has {old[tower]}: the others are "
                f"copied from {label(last.models[0].source)}; check.extra: drop leaves them out"
            )
