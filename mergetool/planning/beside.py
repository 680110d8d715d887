"""What will lie beside a result's weights: which files, and from which model.

The leader's config.json, processors, code and modules; the tokenizer, its templates and generation_config.json of the
model that `tokenizer.source` names, else the leader's. A leader that lacks a config or a tokenizer is stood in for by
the first model that has one, and people are told.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from mergetool.checkpoints.side_files import (
    has_processor,
    has_tokenizer,
    is_sentence_model,
    model_files,
    module_files,
    tokenizer_files,
)
from mergetool.checkpoints.tokens_added import with_tokens
from mergetool.errors import PlanError
from mergetool.planning.graph import Plan
from mergetool.planning.parents import label
from mergetool.tensors.side_files import CONFIG_NAME, GENERATION_NAME, read_config
from mergetool.tensors.writer import Content

_LEFT_BEHIND: tuple[tuple[Callable[[Path | None], bool], str], ...] = (
    (is_sentence_model, "sentence-transformers' modules (modules.json)"),
    (has_processor, "a processor (preprocessor_config.json)"),
)


def config_owner(plan: Plan) -> str:
    """The model whose config.json the result's is made from: the leader, or the first that has one."""
    return _first(plan, lambda folder: bool(read_config(folder)))


def tokenizer_owner(plan: Plan) -> str:
    """The model whose tokenizer goes with the result, or stands first in a union."""
    if plan.recipe.tokenizer is not None and plan.recipe.tokenizer.source in plan.sources:
        return plan.recipe.tokenizer.source
    return _first(plan, has_tokenizer)


def tokenizer_folder(plan: Plan) -> Path | None:
    """Where the tokenizer is that goes with the result."""
    return plan.words.home or plan.sources[tokenizer_owner(plan)].tokenizer_folder


def _first(plan: Plan, has: Callable[[Path | None], bool]) -> str:
    order = (plan.template, *(model for model in plan.recipe.models if model != plan.template))
    return next((model for model in order if has(plan.sources[model].folder)), plan.template)


def generation_owner(plan: Plan) -> str:
    """The model whose generation_config.json goes with the result."""
    owner = tokenizer_owner(plan)
    asked = plan.recipe.tokenizer is not None
    return plan.template if not asked and _has(plan, plan.template, GENERATION_NAME) else owner


def files_beside(plan: Plan) -> dict[str, Path]:
    """Every file that is copied, by its name in the result."""
    paths: dict[str, Path] = {}
    tokens = [tokenizer_folder(plan)]
    if not has_tokenizer(tokens[0]):  # it may have a template of its own for others' tokens
        tokens.insert(0, plan.sources[_first(plan, has_tokenizer)].folder)
    parts = (*((folder, tokenizer_files) for folder in tokens), (plan.sources[config_owner(plan)].folder, model_files))
    for folder, files in parts:
        paths |= {name: folder / name for name in files(folder) if folder is not None}
    owner = generation_owner(plan)
    folder = plan.sources[owner].folder
    if folder is not None and _has(plan, owner, GENERATION_NAME):
        paths[GENERATION_NAME] = folder / GENERATION_NAME
    return dict(sorted(paths.items()))


def made_of_tokens(plan: Plan) -> dict[str, Content]:
    """Files of the tokenizer that are written anew, by name, where tokens are added to it."""
    folder = tokenizer_folder(plan)
    return with_tokens(folder, plan.words.added) if plan.words.added and folder is not None else {}


def words_about_files(plan: Plan) -> Iterator[str]:
    """What comes from elsewhere than from the leader, and what stays behind. Raises PlanError."""
    config, tokenizer = config_owner(plan), tokenizer_owner(plan)
    if plan.recipe.tokenizer is not None and not has_tokenizer(tokenizer_folder(plan)):
        yield _words_without_tokens(plan, tokenizer)
    if config != plan.template:
        yield f"{label(plan.template)} has no {CONFIG_NAME}: the result has that of {label(config)}"
    if plan.recipe.tokenizer is None and tokenizer != plan.template:
        yield f"{label(plan.template)} has no tokenizer: the result has that of {label(tokenizer)}"
    if _has(plan, plan.template, GENERATION_NAME) and not _has(plan, generation_owner(plan), GENERATION_NAME):
        yield f"{label(tokenizer)}, whose tokenizer it is, has no {GENERATION_NAME}: the result has none either"
    yield from _left_behind(plan, config)
    yield from _other_modules(plan, config)


def _words_without_tokens(plan: Plan, asked: str) -> str:
    """What becomes of a tokenizer source that has no vocabulary: a template is taken, of nothing at all nothing.

    Raises PlanError.
    """
    other = _first(plan, has_tokenizer)
    useful = has_tokenizer(plan.sources[other].folder)
    own = tokenizer_files(plan.sources[asked].folder)
    if not own:
        fix = f"write tokenizer: {{source: {other}}}, or leave it out" if useful else "leave tokenizer out"
        raise PlanError(f"{label(asked)} has no tokenizer, and the result is to have its", "tokenizer.source", fix)
    rest = f"the tokens are those of {label(other)}" if useful else "the result has no vocabulary"
    return f"{label(asked)} has {', '.join(own)} and no tokenizer: {rest}"


def _left_behind(plan: Plan, owner: str) -> Iterator[str]:
    for has, what in _LEFT_BEHIND:
        models = [model for model in plan.recipe.models if has(plan.sources[model].folder)]
        if models and not has(plan.sources[owner].folder):
            yield f"{label(models[0])} has {what}, {label(owner)} has none, so the result has none either"


def _other_modules(plan: Plan, owner: str) -> Iterator[str]:
    """Weights in modules, which are copied: a word where those of parents differ."""
    home = plan.sources[owner].folder
    weights = [name for name in module_files(home) if name.endswith((".safetensors", ".bin"))]
    for model in plan.recipe.models:
        folder = plan.sources[model].folder
        for name in weights:
            if home and folder and model != owner and _differ(home / name, folder / name):
                yield (
                    f"{name} of {label(owner)} and {label(model)} differ; such modules are not merged, the result has "
                    f"that of {label(owner)}"
                )


def _differ(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() != other.read_bytes()


def _has(plan: Plan, model: str, name: str) -> bool:
    folder = plan.sources[model].folder
    return folder is not None and (folder / name).is_file()
