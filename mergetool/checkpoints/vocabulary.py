"""Which token every id of a model means, as far as plain files tell, and where two models disagree.

Read are `tokenizer.json` (all its models), `vocab.json`, `vocab.txt`, and SentencePiece's `tokenizer.model` and
`spiece.model`, with `added_tokens.json` and what `tokenizer_config.json` adds. Of other vocabularies (tiktoken) only
whether they are the same file can be said.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.checkpoints.sentencepiece import pieces_in

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
"""Where a vocabulary is, the most telling file first."""
_READ = FILES[:5]
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model."""

    texts: Mapping[int, str]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Numbers by text; the first of several."""
        numbers: dict[str, int] = {}
        for number in sorted(self.texts):
            numbers.setdefault(self.texts[number], number)
        return numbers


class PackedTexts(Mapping[int, str]):
    """Texts of tokens by id that are kept for long: as bytes in a row, where text by text takes ten times the room."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        numbers = sorted(texts)
        written = [texts[number].encode("utf-8", "surrogatepass") for number in numbers]
        self._numbers = np.array(numbers, np.int64)
        self._ends = np.cumsum([0, *map(len, written)])
        self._bytes = b"".join(written)

    def __getitem__(self, number: int) -> str:
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            raise KeyError(number)
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __len__(self) -> int:
        return len(self._numbers)


def forget_tokens() -> None:
    """Let go of what plans have read of tokenizers."""
    _tokens_in.cache_clear()


def tokens_of(folder: Path | None) -> dict[int, str] | None:
    """Tokens by id; None where there is no vocabulary that can be read."""
    file = vocabulary_file(folder)
    return None if file is None else _tokens_in(file, _stamp(file))


def vocabulary_file(folder: Path | None) -> Path | None:
    """The file that tells the tokens of a folder, if one does."""
    return next((folder / name for name in _READ if (folder / name).is_file()), None) if folder else None


@lru_cache(maxsize=16)
def _tokens_in(path: Path, _: tuple[int, int]) -> dict[int, str] | None:
    """Read once, however many plans ask (those of a search); not to be changed."""
    read = _READERS[path.name]
    try:
        return read(path) | ({} if read is _of_tokenizer else _added(path.parent))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _added(folder: Path) -> dict[int, str]:
    """What is added to a vocabulary beside it."""
    told = small_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return {int(place): str(each["content"]) for place, each in told.items()} | _of_json(folder / "added_tokens.json")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _of_tokenizer(path: Path) -> dict[int, str]:
    content = _json(path)
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, dict):
        tokens = {int(place): str(token) for token, place in vocabulary.items()}
    else:
        tokens = {place: str(token) for place, (token, _) in enumerate(vocabulary)}
    return tokens | {int(each["id"]): str(each["content"]) for each in content.get("added_tokens") or ()}


def _of_json(path: Path) -> dict[int, str]:
    return {int(place): str(token) for token, place in _json(path).items()} if path.is_file() else {}


def _of_text(path: Path) -> dict[int, str]:
    return dict(enumerate(path.read_text("utf-8").splitlines()))


def _of_pieces(path: Path) -> dict[int, str]:
    return dict(enumerate(pieces_in(path.read_bytes())))


_READERS = dict(zip(_READ, (_of_tokenizer, _of_json, _of_text, _of_pieces, _of_pieces), strict=True))


def _json(path: Path) -> Any:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError("too large")
    return json.loads(path.read_text("utf-8"))


def disagreement(one: Path | None, other: Path | None) -> str | None:
    """How the vocabularies of two folders differ in what an id means; None where they agree or nothing can be said."""
    name = _differing(one, other)
    if name is None:
        return None
    ours, theirs = tokens_of(one), tokens_of(other)
    if ours is None or theirs is None:
        return None if name in _READ else f"{name} is another file"
    different = sorted(place for place in ours.keys() & theirs.keys() if ours[place] != theirs[place])
    if not different:
        return None
    first = different[0]
    return (
        f"{len(different)} of {len(ours.keys() & theirs.keys())} token ids mean other tokens: "
        f"{first} is {ours[first]!r} and {theirs[first]!r}"
    )


def more_tokens(one: Path | None, other: Path | None) -> list[str]:
    """Tokens of the second folder at ids that mean nothing in the first; none where nothing can be said."""
    if _differing(one, other) not in _READ:
        return []
    ours, theirs = tokens_of(one), tokens_of(other)
    return [] if ours is None or theirs is None else [theirs[place] for place in sorted(theirs.keys() - ours.keys())]


def _differing(one: Path | None, other: Path | None) -> str | None:
    """The most telling file about tokens that both folders have, if they hold different bytes under its name."""
    if one is None or other is None:
        return None
    name = next((name for name in FILES if (one / name).is_file() and (other / name).is_file()), None)
    if name is None or _same_bytes(one / name, _stamp(one / name), other / name, _stamp(other / name)):
        return None
    return name


@lru_cache(maxsize=64)
def _same_bytes(one: Path, stamp: tuple[int, int], other: Path, other_stamp: tuple[int, int]) -> bool:
    return stamp[0] == other_stamp[0] and one.read_bytes() == other.read_bytes()


def chat_template_of(folder: Path | None) -> str | None:
    """The chat template of a folder, wherever transformers keeps it; of several with names, the default one."""
    if folder is None:
        return None
    plain, processors = (folder / name for name in _TEMPLATES)
    if plain.is_file():
        return plain.read_text("utf-8", errors="replace")
    settings = processors if processors.is_file() else folder / "tokenizer_config.json"
    template = small_json(settings).get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) and template else None


def small_json(path: Path) -> Mapping[str, Any]:
    """The object in a small JSON file; empty where there is none."""
    try:
        content = _json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def end_tokens(folder: Path | None, config: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, as generation_config.json says, else config.json."""
    told = small_json(folder / "generation_config.json").get("eos_token_id") if folder is not None else None
    told = config.get("eos_token_id") if told is None else told
    return sorted(told) if isinstance(told, list) else [] if told is None else [told]


def special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens that a config states."""
    return {key: value for key, value in config.items() if key.endswith("_token_id")}
