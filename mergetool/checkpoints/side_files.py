"""Files that lie beside a model's weights and belong to it: what must go along for a result to be used like its parent.

Two parts, since a result may have the tokenizer of another parent than its config:

    tokenizer_files   the tokenizer in whatever form, its templates, its Python code
    model_files       processors, sentence-transformers' modules, Python code with all that it imports, licences

Never: other weights, a training's state, cards, notes. All names are relative to the model's folder.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergetool.checkpoints.vocabulary import small_json
from mergetool.tensors.side_files import (
    CODE_GLOBS,
    CONFIG_NAME,
    GENERATION_NAME,
    MODEL_GLOBS,
    MODULES_NAME,
    TEMPLATE_GLOBS,
    TOKENIZER_CODE_GLOBS,
    TOKENIZER_GLOBS,
    matches,
    module_folders,
)

_TOKENIZER_CONFIG = "tokenizer_config.json"
_IMPORT = re.compile(r"^\s*from\s+(\.+)([\w.]*)\s+import\s+(\([^)]*\)|[^\n#]*)", re.MULTILINE)
_TRAINING = re.compile(r"(optimizer|scheduler|rng_state|training_args|trainer_state|scaler).*")
_SEARCHED = ("additional_chat_templates", "custom_generate")
"""Folders that libraries look into, whatever is in them."""


def tokenizer_files(folder: Path | None) -> list[str]:
    """The tokenizer's own files, its chat templates and its code."""
    if folder is None:
        return []
    own = [name for name in _names(folder) if matches(name, (*TOKENIZER_GLOBS, *TEMPLATE_GLOBS))]
    code = [name for name in _names(folder) if matches(name, TOKENIZER_CODE_GLOBS)]
    return sorted({*own, *_with_imports(folder, [*code, *_mapped(folder, [_TOKENIZER_CONFIG])])})


def has_tokenizer(folder: Path | None) -> bool:
    """Whether there is any tokenizer in a folder."""
    return folder is not None and any(matches(name, TOKENIZER_GLOBS) for name in _directly(folder))


def model_files(folder: Path | None) -> list[str]:
    """Everything else that goes with a model, but config.json (which changes) and generation_config.json."""
    if folder is None:
        return []
    own = [name for name in _names(folder) if matches(name, MODEL_GLOBS)]
    code = [name for name in _names(folder) if matches(name, CODE_GLOBS)]
    mapped = _mapped(folder, [CONFIG_NAME, *(name for name in own if name.endswith("config.json"))])
    return sorted({*own, *_with_imports(folder, [*code, *mapped]), *module_files(folder)})


def side_files(folder: Path | None) -> list[str]:
    """All of these, and generation_config.json."""
    generation = [GENERATION_NAME] if folder is not None and (folder / GENERATION_NAME).is_file() else []
    return sorted({*tokenizer_files(folder), *model_files(folder), *generation})


def module_files(folder: Path | None) -> list[str]:
    """Files of sentence-transformers' modules (pooling, dense layers), with their weights."""
    if folder is None:
        return []
    places = [place for name in module_folders(folder) for place in (folder / name).rglob("*")]
    return sorted(
        place.relative_to(folder).as_posix()
        for place in places
        if place.is_file() and not _TRAINING.fullmatch(place.name) and not place.name.startswith(".")
    )


def is_sentence_model(folder: Path | None) -> bool:
    """Whether sentence-transformers finds its modules here."""
    return folder is not None and (folder / MODULES_NAME).is_file()


def has_processor(folder: Path | None) -> bool:
    """Whether it is said how images or sounds become tensors."""
    return folder is not None and any(matches(name, ("*processor_config.json",)) for name in _directly(folder))


def _names(folder: Path) -> Iterator[str]:
    """Files in a folder, and in those of its folders that libraries look into."""
    yield from _directly(folder)
    for inside in _SEARCHED:
        yield from (f"{inside}/{name}" for name in _directly(folder / inside))


def _directly(folder: Path) -> Iterator[str]:
    """Files in a folder itself."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if entry.is_file())


# -------------------------------------------------------------------- Python code


def _mapped(folder: Path, configs: Iterable[str]) -> list[str]:
    """Python files in the folder that `auto_map` and `custom_pipelines` name, wherever they stand in these configs."""
    classes = [text for name in configs for text in _classes(small_json(folder / name))]
    files = [f"{text.rpartition('.')[0]}.py" for text in classes if "--" not in text]  # else another repository's
    return [name for name in files if (folder / name).is_file() and "/" not in name]


def _classes(config: Any) -> Iterator[str]:
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in ("auto_map", "custom_pipelines"):
            yield from re.findall(r'"([\w./-]+\.\w+)"', json.dumps(value))
        yield from _classes(value)


def _with_imports(folder: Path, files: Iterable[str]) -> set[str]:
    """Python files and all that they import relatively, whatever it imports in turn."""
    known: set[str] = set()
    waiting = list(files)
    while waiting:
        name = waiting.pop()
        if name not in known:
            known.add(name)
            waiting += _imports(folder, name)
    return known


def _imports(folder: Path, name: str) -> Iterator[str]:
    """Files in the folder that a Python file imports relatively."""
    text = (folder / name).read_text("utf-8", errors="replace")
    for dots, module, names in _IMPORT.findall(text):
        start = Path(name).parents[len(dots) - 1 : len(dots)]
        if not start:
            continue
        target = start[0].joinpath(*module.split(".")) if module else start[0]
        inside = [target / each for each in re.findall(r"\w+", names)]
        for place in (target, *inside):
            for path in (place.with_suffix(".py") if place.name else None, place / "__init__.py"):
                if path is not None and (folder / path).is_file():
                    yield path.as_posix()
