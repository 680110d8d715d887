"""The seam of bundles to transformers: build the base from its config, and read its tokenizer.

There are two more: `evaluate.model` opens whole language models, `arch.auto` builds networks to trace them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergetool.errors import SourceError
from mergetool.tensors.source import ModelSource, open_model

try:
    import transformers as transformers  # `auto` needs it too
except ImportError as error:  # pragma: no cover  (the test environment has it)
    raise SourceError(
        "running a bundle needs transformers, which is not installed", "bundle", "pip install 'mergetool[eval]'"
    ) from error


_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class LoadedBase:
    """A model, and what its parameters and buffers are called in the checkpoint that it came from."""

    model: nn.Module
    names: Mapping[str, str]


def load_base(folder: Path, dtype: torch.dtype | None, *, encoder: bool) -> LoadedBase:
    """The model that a checkpoint's config.json names, or only its encoder; ready to predict. Raises SourceError."""
    config = transformers.AutoConfig.from_pretrained(folder)
    architectures = [] if encoder else config.architectures or []
    kind: Any = getattr(transformers, architectures[0], None) if architectures else transformers.AutoModel
    if kind is None:
        what = f"transformers {transformers.__version__} has no {architectures[0]}"
        raise SourceError(what, str(folder), "install the version that the base was made with")
    with _quiet():
        model = kind.from_pretrained(folder, dtype=dtype or "auto").eval()
        return LoadedBase(model, _names(model, open_model(folder)))


def _names(model: Any, checkpoint: ModelSource) -> dict[str, str]:
    """Names in the checkpoint by name in the model.

    transformers renames tensors while it loads them, differently in every version. So a checkpoint is loaded in which
    every entry of a tensor is that tensor's number, and the numbers tell where each one went.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in tensors:
        same = (each for each in (name, prefix + name, name.removeprefix(prefix)) if each in checkpoint.specs)
        if stored := next(same, None):
            found[name] = stored
    if set(found.values()) == set(checkpoint.specs):
        return found
    numbered = list(checkpoint.specs)
    marked = {name: torch.full(checkpoint.specs[name].shape, float(i)) for i, name in enumerate(numbered)}
    probe = type(model).from_pretrained(None, config=model.config, state_dict=marked, dtype=torch.float32)
    for name, value in {**dict(probe.named_parameters(remove_duplicate=False)), **dict(probe.named_buffers())}.items():
        if name not in found and value.numel() and bool((value == value.detach().reshape(-1)[0]).all()):
            number = float(value.detach().reshape(-1)[0])
            stored = numbered[int(number)] if number in range(len(numbered)) else None
            if stored is not None and checkpoint.specs[stored].num_elements == value.numel():
                found[name] = stored
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no remarks about parts of a checkpoint that an encoder does not use."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises SourceError where there is none."""
    fix = "give tensors instead of text, or add the tokenizer's files"
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one up
        raise SourceError(f"has no tokenizer (looked for {', '.join(_VOCABULARIES)})", str(folder), fix)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        what = f"transformers cannot read its tokenizer ({str(error).splitlines()[0][:100]})"
        raise SourceError(what, str(folder), fix) from None
