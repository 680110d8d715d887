"""Tokens that are added to a tokenizer: how its files tell them, and the files with more of them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergetool.checkpoints.json_text import with_entries
from mergetool.checkpoints.vocabulary import small_json
from mergetool.tensors.writer import Content

_TOKENIZER, _SETTINGS, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""What a token is that is added without further words."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a tokenizer gets."""

    number: int
    text: str
    flags: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """As files tell it."""
        return {"content": self.text, **_FLAGS, **self.flags}


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that a tokenizer gets, numbered from the first on. There may be as many as in a vocabulary: none of them
    is kept as more than its text."""

    first: int = 0
    texts: Sequence[str] = ()
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By text, of those that have any."""

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[AddedToken]:
        for number, text in enumerate(self.texts, self.first):
            yield AddedToken(number, text, self.flags.get(text, {}))


def added_tokens_of(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The flags of the tokens that were added to a folder's tokenizer, by text."""
    if folder is None:
        return {}
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in _flag_files(folder)]
    return _added_in(folder, tuple(stamps))


def _flag_files(folder: Path) -> list[Path]:
    return [folder / name for name in (_TOKENIZER, _SETTINGS) if (folder / name).is_file()]


@lru_cache(maxsize=16)
def _added_in(folder: Path, _: tuple[tuple[int, int], ...]) -> dict[str, dict[str, Any]]:
    """Read once for each state of the files; not to be changed."""
    told = [*(small_json(folder / _TOKENIZER).get("added_tokens") or ())]
    told += (small_json(folder / _SETTINGS).get(_DECODER) or {}).values()
    return {
        str(each["content"]): {key: each[key] for key in _FLAGS if key in each}
        for each in reversed(told)
        if isinstance(each, dict) and "content" in each
    }


def with_tokens(folder: Path, added: Iterable[AddedToken]) -> dict[str, Content]:
    """The files of a tokenizer that change when it gets these tokens, by name."""
    made: dict[str, Content] = {}
    whole, settings = folder / _TOKENIZER, folder / _SETTINGS
    if whole.is_file():
        listed = (_written({"id": each.number, **each.facts}) for each in added)
        made[_TOKENIZER] = with_entries(whole.read_bytes(), "added_tokens", listed, b"[]")
    if small_json(settings).get(_DECODER) or not whole.is_file():
        named = (f'"{each.number}": {_written(each.facts)}' for each in added)
        text = settings.read_bytes() if small_json(settings) else b"{}"
        made[_SETTINGS] = b"".join(with_entries(text, _DECODER, named, b"{}"))
    if (folder / _ADDED).is_file() or not whole.is_file():
        known = {**small_json(folder / _ADDED), **{each.text: each.number for each in added}}
        made[_ADDED] = _written(known) + "\n"
    return made


def _written(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False)  # in one line: a vocabulary is long
