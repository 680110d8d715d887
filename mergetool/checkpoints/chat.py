"""How a chat is written: the templates that come with the package, and token ids that go with another's template.

A model's template ends a turn with tokens of its own. The numbers of these (and of all special tokens) are another
vocabulary's numbers in the result, so they are carried over by text.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mergetool.checkpoints.vocabulary import Vocabulary, small_json

ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "exaone": "[|endofturn|]"}
"""What ends a turn in the templates that come with the package; others end with the tokenizer's own end of text."""
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def own_template(name: str) -> str:
    """The text of a template that comes with the package."""
    return (files("mergetool.checkpoints") / "templates" / f"{name}.jinja").read_text("utf-8")


def token_texts(folder: Path | None) -> dict[str, str]:
    """The special tokens that a tokenizer names, as `eos_token: TEXT`."""
    if folder is None:
        return {}
    told = {**small_json(folder / "special_tokens_map.json"), **small_json(folder / "tokenizer_config.json")}
    tokens = {key: told.get(key) for key in (f"{role}_token" for role in _ROLES)}
    texts = {key: each.get("content") if isinstance(each, dict) else each for key, each in tokens.items()}
    return {key: each for key, each in texts.items() if isinstance(each, str)}


def special_numbers(folder: Path | None, vocabulary: Vocabulary) -> dict[str, int]:
    """`eos_token_id: NUMBER` and the like, for the tokens that a tokenizer names."""
    return {f"{key}_id": vocabulary.ids[text] for key, text in token_texts(folder).items() if text in vocabulary.ids}


def carried_over(ids: Mapping[str, Any], theirs: Vocabulary, ours: Vocabulary) -> dict[str, Any]:
    """Ids of special tokens (one, or a list) as another vocabulary numbers the same texts; without those it lacks."""
    carried: dict[str, Any] = {}
    for key, value in ids.items():
        texts = [theirs.texts.get(each) for each in (value if isinstance(value, list) else [value])]
        numbers = [ours.ids[text] for text in texts if text in ours.ids]
        if numbers:
            carried[key] = numbers if isinstance(value, list) else numbers[0]
    return carried
