"""The chat template of a result, and what must follow it: the tokens that end a text, wherever files tell them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.checkpoints.chat import ENDS, carried_over, own_template, special_numbers, token_texts
from mergetool.checkpoints.vocabulary import Vocabulary, chat_template_of, small_json, special_ids, tokens_of
from mergetool.errors import PlanError
from mergetool.planning.beside import generation_owner, made_of_tokens, tokenizer_folder, tokenizer_owner
from mergetool.planning.graph import Plan
from mergetool.planning.parents import label
from mergetool.recipe.words import AUTO, TEMPLATES
from mergetool.tensors.side_files import GENERATION_NAME, read_config
from mergetool.tensors.writer import Content

_TEMPLATE, _SETTINGS, _SPECIAL = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
_PROCESSORS = "chat_template.json"
_END = "eos_token"


@dataclass(frozen=True)
class Chat:
    """A template that was asked for."""

    text: str
    model: str | None = None
    """Whose it is."""
    end: str | None = None
    """The token that ends a turn, where it is not the tokenizer's end of text."""


def chat_of(plan: Plan) -> Chat | None:
    """The template that a recipe asks for. Raises PlanError where it is not there."""
    asked = plan.recipe.chat_template
    if asked is None:
        return None
    if asked.text is not None:
        return Chat(asked.text)
    if asked.file is not None:
        return Chat(_read(plan.recipe.path_of(asked.file)))
    assert asked.name is not None
    if asked.name in plan.sources:
        return _of_model(plan, asked.name)
    if asked.name in TEMPLATES:
        return Chat(own_template(asked.name), end=ENDS.get(asked.name))
    return _of_most(plan)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the template cannot be read: {error}", str(path), "check the path") from None


def _of_model(plan: Plan, model: str) -> Chat:
    folder = plan.sources[model].tokenizer_folder
    text = chat_template_of(folder)
    if text is None:
        having = [name for name, source in plan.sources.items() if chat_template_of(source.tokenizer_folder)]
        names = having or [name for name in TEMPLATES if name not in plan.sources]
        raise PlanError(f"{label(model)} has no chat template", "chat_template", f"write one of: {', '.join(names)}")
    return Chat(text, model, token_texts(folder).get(_END))


def _of_most(plan: Plan) -> Chat:
    """The template of most models; of several, the first model's."""
    templates = {model: chat_template_of(source.tokenizer_folder) for model, source in plan.sources.items()}
    counts = Counter(text for text in templates.values() if text)
    if not counts:
        what = f"no model has a chat template, so `{AUTO}` finds none"
        raise PlanError(what, "chat_template", f"write one of: {', '.join(TEMPLATES)}")
    chosen = counts.most_common(1)[0][0]
    return _of_model(plan, next(model for model, text in templates.items() if text == chosen))


# -------------------------------------------------------------------- numbers of special tokens


def vocabulary_of(plan: Plan) -> Vocabulary | None:
    """The tokens of the result, where they can be read."""
    texts = plan.words.texts or tokens_of(tokenizer_folder(plan))
    return None if texts is None else Vocabulary(texts)


def special_tokens(plan: Plan) -> dict[str, Any]:
    """Ids of special tokens that config.json and generation_config.json are to state, beyond the tokenizer owner's."""
    ours = vocabulary_of(plan)
    if ours is None:
        return {}
    ids = special_numbers(plan.words.home, ours) if plan.words.home else {}
    chat = chat_of(plan)
    if chat is None:
        return ids
    if chat.model not in (None, tokenizer_owner(plan)):
        folder = plan.sources[chat.model].folder
        theirs = Vocabulary(tokens_of(plan.sources[chat.model].tokenizer_folder) or {})
        told = {**special_ids(read_config(folder)), **special_ids(small_json(_generation(folder)))}
        ids |= carried_over({key: each for key, each in told.items() if key == f"{_END}_id"}, theirs, ours)
    elif chat.end in ours.ids and chat.model is None:
        ids |= {f"{_END}_id": ours.ids[chat.end]}
    return ids


def _generation(folder: Path | None) -> Path:
    return (folder or Path()) / GENERATION_NAME


# -------------------------------------------------------------------- files


def made_beside(plan: Plan) -> dict[str, Content]:
    """Files that are written anew, by name: the tokenizer's with what is added to it, the template, who ends a text."""
    made, chat = made_of_tokens(plan), chat_of(plan)
    folder = tokenizer_folder(plan)
    if chat is not None:
        made[_TEMPLATE] = chat.text
        made |= _settings(folder, made, chat, vocabulary_of(plan))
    if special := special_tokens(plan):
        made |= _generation_file(plan, special)
    return made


def _settings(folder: Path | None, made: Mapping[str, Content], chat: Chat, ours: Vocabulary | None) -> dict[str, str]:
    """Files that hold the template too, or the token that ends a text, where a folder has them."""
    texts = {}
    for name in (_SETTINGS, _SPECIAL, _PROCESSORS):
        written = made.get(name)
        content = json.loads(written) if isinstance(written, str | bytes) else small_json((folder or Path()) / name)
        changed = dict(content)
        if "chat_template" in content:
            changed["chat_template"] = chat.text
        if chat.end is not None and ours is not None and chat.end in ours.ids and _END in content:
            changed[_END] = chat.end
        if folder is not None and changed != content:
            texts[name] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    return texts


def _generation_file(plan: Plan, special: Mapping[str, Any]) -> dict[str, str]:
    home = _generation(plan.words.home) if plan.words.home else None
    own = _generation(plan.sources[generation_owner(plan)].folder)
    told = small_json(home if home is not None and home.is_file() else own)
    if not told:
        return {}
    changed = {**told, **{key: each for key, each in special.items() if key in told or key == f"{_END}_id"}}
    return {GENERATION_NAME: json.dumps(changed, indent=2, ensure_ascii=False) + "\n"}


def words_about_chat(plan: Plan) -> Iterator[str]:
    """A template whose end of a turn is no token: it would never be seen."""
    chat, ours = chat_of(plan), vocabulary_of(plan)
    if chat is not None and chat.end is not None and ours is not None and chat.end not in ours.ids:
        source = plan.recipe.tokenizer.source if plan.recipe.tokenizer else tokenizer_owner(plan)
        yield (
            f"the chat template ends a turn with {chat.end!r}, which is no token of the result: to add it, "
            f"tokenizer: {{source: {source}, tokens: {{{chat.end!r}: {{}}}}}}"
        )
