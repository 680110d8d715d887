"""The small files of a model folder: config, tokenizer, generation settings. What travels with a merge."""

import json
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mergetool.errors import SourceError
from mergetool.tensors.foreign import disguised
from mergetool.tensors.io import read_error

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
MODULES_NAME = "modules.json"
GENERATION_NAME = "generation_config.json"
TOKENIZER_GLOBS = (
    "tokenizer*",
    "*.tokenizer",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "*_vocab.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "merges*.txt",
    "tekken*.json",
    "dict.txt",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
)
"""Files of a tokenizer, of whichever kind."""
TEMPLATE_GLOBS = ("chat_template*", "additional_chat_templates/*.jinja")
MODEL_GLOBS = (
    "params.json",
    "open_clip_config.json",
    "*preprocessor_config.json",
    "*processor_config.json",
    "feature_extractor*.json",
    "audio_tokenizer_config.json",
    MODULES_NAME,
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "custom_generate/*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
"""Processors, sentence-transformers, own ways to generate, and what everybody who passes a model on must add."""
CODE_GLOBS = ("configuration_*.py", "modeling_*.py", "*process*_*.py", "feature_extraction_*.py")
TOKENIZER_CODE_GLOBS = ("tokenization_*.py",)
_CARRIED = (*TOKENIZER_GLOBS, *TEMPLATE_GLOBS, *MODEL_GLOBS, GENERATION_NAME, "*.py")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".gguf", ".pkl")
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


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a file, named from its model's folder, is one of these; a glob without a slash means that folder only."""
    if name.endswith(_WEIGHTS):
        return False
    return any(name.count("/") == glob.count("/") and fnmatchcase(name, glob) for glob in globs)


def may_be_carried(name: str, modules: Collection[str]) -> bool:
    """Whether a file of this name may go with a merge. `modules` are the folders of sentence-transformers' modules."""
    return matches(name, _CARRIED) or any(name.startswith(f"{folder}/") for folder in modules)


def module_folders(folder: Path) -> list[str]:
    """The folders that sentence-transformers' modules.json names. Raises SourceError for one that lies elsewhere."""
    try:
        modules = json.loads((folder / MODULES_NAME).read_text("utf-8"))
        paths = [str(module.get("path") or "") for module in modules]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    for path in paths:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            what = f"names a module at {path!r}, which is not in this folder"
            raise SourceError(what, str(folder / MODULES_NAME), "get the model from a source you trust")
    return [Path(path).as_posix() for path in paths if path not in ("", ".")]


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
    licence = facts.get("license")
    named = facts.get("license_name") if licence == "other" else licence
    return str(named or licence)[:80] if isinstance(named or licence, str) else None
