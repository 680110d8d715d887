"""The small files of a model folder: config, tokenizer, generation settings. What travels with a merge."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mergetool.errors import SourceError
from mergetool.tensors.foreign import disguised
from mergetool.tensors.io import read_error

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
CARRIED = (
    "params.json",
    "open_clip_config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "*_processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)
"""Globs of the files that go with a merge."""
_MAX_CONFIG_BYTES = 20_000_000
_MAX_CARD = 100_000


def read_config(folder: Path | None) -> dict[str, Any]:
    """The folder's config.json, or an empty mapping where there is none. Raises SourceError if it is not JSON."""
    if folder is None:
        return {}
    path = folder / CONFIG_NAME
    fix = "repair the file, or get the model again"
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise SourceError("is far too large for a config", str(path), fix)
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        if (other := disguised(path)) is not None:
            raise other from None
        raise SourceError(f"is not valid JSON ({str(error)[:100]})", str(path), fix) from None
    except OSError as error:
        raise read_error(error, str(path)) from error
    if not isinstance(config, dict):
        raise SourceError("is not a JSON object", str(path), fix)
    if str(config.get("_name_or_path")).startswith("/"):  # of whichever machine wrote it: nobody else's business
        del config["_name_or_path"]
    return config


def carried_files(folder: Path | None) -> list[Path]:
    """Tokenizer, generation and processor files of a folder, by name."""
    if folder is None:
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatchcase(path.name, glob) for glob in CARRIED)
    )


def licence_of(folder: Path | None) -> str | None:
    """The licence that a folder's model card claims, as its identifier (or its name, where that is `other`)."""
    if folder is None or not (folder / CARD_NAME).is_file():
        return None
    import yaml

    try:
        with (folder / CARD_NAME).open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_CARD)
        _, front, _ = text.split("---", 2) if text.startswith("---") else ("", "", "")
        facts = yaml.safe_load(front)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(facts, dict):
        return None
    found = facts.get("license")
    named = facts.get("license_name") if found == "other" else found
    return str(named or found)[:80] if isinstance(named or found, str) else None
