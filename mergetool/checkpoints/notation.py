"""One token in two notations: how a tokenizer writes the beginning of a word, and what it calls its special tokens.

byte-level BPE   Ġthe        SentencePiece   ▁the
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from mergetool.checkpoints.chat import token_texts

_BEGINNINGS = ("Ġ", "▁")
"""What stands for the space before a word."""


def beginning_of(texts: Iterable[str]) -> str | None:
    """How these tokens write the beginning of a word; None where they do not."""
    counts = dict.fromkeys(_BEGINNINGS, 0)
    for text in texts:
        if text[:1] in counts:
            counts[text[:1]] += 1
    most = max(counts, key=lambda each: counts[each])
    return most if counts[most] else None


def in_notation_of(
    ours: Mapping[int, str], home: Path | None, theirs: Mapping[int, str], other: Path | None
) -> dict[int, str]:
    """Our tokens as the other tokenizer writes them; a special token that it lacks as its own of the same role."""
    known = set(theirs.values())
    mine, wanted = token_texts(other), token_texts(home)
    roles = {text: mine[role] for role, text in reversed(wanted.items()) if role in mine and text not in known}
    begins, instead = beginning_of(ours.values()), beginning_of(known)
    rewritten = {}
    for number, text in ours.items():
        if begins and instead and begins != instead and text.startswith(begins):
            text = instead + text[len(begins) :]  # noqa: PLW2901
        rewritten[number] = roles.get(text, text)
    return rewritten
