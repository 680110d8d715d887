"""The tokenizer of a model folder."""

from functools import partial
from pathlib import Path
from typing import Any

from mergetool.checkpoints.vocabulary import FILES, small_json
from mergetool.errors import MergetoolError, SourceError
from mergetool.networks.library import first_line, library, quiet

_FILES = (*FILES, "sentencepiece.bpe.model", "spm.model", "source.spm")
_WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Tokenizers of bytes and characters."""


def load_tokenizer(
    *folders: Path,
    kind: type[MergetoolError] = SourceError,
    fix: str = "give tensors instead of text, or add the tokenizer's files",
) -> Any:
    """The tokenizer of the first folder, or of the next one that has one where it has none that can pad.

    Raises an error of a kind where none has any.
    """
    transformers = library("reading text", str(folders[0]), kind)
    having = [folder for folder in folders if has_tokenizer(folder)]
    if not having:  # transformers would make an empty one up
        raise kind(f"holds no tokenizer (looked for {', '.join(_FILES)})", str(folders[0]), fix)
    try:
        with quiet():
            load = partial(transformers.AutoTokenizer.from_pretrained, local_files_only=True)
            tokenizers = [load(folder) for folder in having[:2]]
    except Exception as error:  # what lies there is read by many libraries: anything may come out of them
        what = f"its tokenizer cannot be opened: {first_line(error)}"
        raise kind(what, str(having[0]), "save the tokenizer again with save_pretrained") from error
    return next((tokenizer for tokenizer in tokenizers if tokenizer.pad_token is not None), tokenizers[0])


def has_tokenizer(folder: Path) -> bool:
    """Whether the files of a tokenizer lie in a folder."""
    named = small_json(folder / "tokenizer_config.json").get("tokenizer_class")
    return named in _WITHOUT_FILES or any((folder / name).is_file() for name in _FILES)
