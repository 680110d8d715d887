"""Text as a model's inputs: what people write, before it is numbers.

"one text"      ["several", "texts"]      {"text": "a premise", "pair": "a hypothesis"}      a list of those
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergetool.errors import SourceError
from mergetool.networks.tokenizer import load_tokenizer

Text = str | Mapping[str, str]
Texts = Text | Sequence[Text]

_ENDLESS = 1 << 31
"""Tokenizers that know no longest text name a number beyond this."""
_PAIR = ("pair", "text_pair")


class TextReader:
    """A tokenizer that is opened when the first text comes. Safe for several threads."""

    def __init__(self, folders: Sequence[Path], longest: int | None) -> None:
        """`folders`: as for `load_tokenizer`; `longest`: most tokens that the model can see, where it says so."""
        self._folders = folders
        self._longest = longest
        self._lock = threading.RLock()  # tokenizers keep how they pad and cut in themselves
        self._opened: Any = None

    @property
    def tokenizer(self) -> Any:
        """Raises SourceError where there is none."""
        with self._lock:
            if self._opened is None:
                self._opened = load_tokenizer(*self._folders)
            return self._opened

    def batch(self, texts: Texts) -> dict[str, Tensor]:
        """One batch, padded, none longer than the model can see. Raises SourceError for what is no text."""
        words, pairs = split(texts)
        tokenizer = self.tokenizer
        longest = min(tokenizer.model_max_length, self._longest or tokenizer.model_max_length)
        cut = {"truncation": True, "max_length": longest} if longest < _ENDLESS else {}
        with self._lock:
            return dict(tokenizer(words, pairs, padding=True, return_tensors="pt", **cut))


def split(texts: Texts) -> tuple[list[str], list[str] | None]:
    """First and second texts of a batch (None where there are no second ones). Raises SourceError."""
    rows = [parts_of(text) for text in listed(texts)]
    if not rows:
        raise SourceError("the batch is empty", "text", "give at least one text")
    seconds = [pair for _, pair in rows if pair is not None]
    if seconds and len(seconds) < len(rows):
        raise SourceError("some texts come in pairs and others alone", "text", "ask for them in two batches")
    return [text for text, _ in rows], seconds or None


def listed(texts: Texts) -> list[Text]:
    """A batch of texts, whether one was given or several."""
    return list(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else [texts]


def parts_of(text: Any) -> tuple[str, str | None]:
    """A text, and what it is paired with. Raises SourceError for what is no text."""
    if isinstance(text, str):
        return _whole(text), None
    if isinstance(text, Mapping) and "text" in text and set(text) <= {"text", *_PAIR} and len(text) <= 2:
        pair = next((text[key] for key in _PAIR if key in text), None)
        if isinstance(text["text"], str) and (pair is None or isinstance(pair, str)):
            return _whole(text["text"]), pair and _whole(pair)
    what = f"{str(text)[:60]!r} ({type(text).__name__}) is no text"
    raise SourceError(what, "text", 'write "a text", or {"text": "a text", "pair": "another"}; tensors go by name')


def _whole(text: str) -> str:
    """The text. Raises SourceError for half a character, which JSON can write, but no tokenizer reads."""
    if text.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in text):
        return text
    what = f"{ascii(text)[:60]} holds half a character (a surrogate)"
    fix = "write text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'), or cut texts between characters"
    raise SourceError(what, "text", fix)


def longest(model: nn.Module) -> int | None:
    """Most tokens that a model can see at once, where its config says so."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None
