"""A language model held in memory to be evaluated again and again, while its weights change under it.

The seam to transformers. The model is built once from a folder; `slots` are its live tensors by their names in the
checkpoint, to be overwritten in place (tied tensors share memory, so writing one writes both).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import EvaluationError
from mergetool.evaluate.harness import INSTALL, quiet, wrapped
from mergetool.tensors.side_files import read_config

if TYPE_CHECKING:
    from torch import Tensor

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


class LanguageModel:
    """A model and its tokenizer, wrapped for lm-eval as `lm`. Raises EvaluationError for what cannot be evaluated."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: Path | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.folder = folder
        self.tokenizer_folder = tokenizer or folder
        self.model = _load_model(folder, dtype).to(device).eval()
        self.tokenizer = _load_tokenizer(self.tokenizer_folder)
        self.lm = wrapped(self.model, self.tokenizer, batch_size)

    def slots(self, names: Collection[str]) -> "Mapping[str, Tensor]":
        """Live tensors by checkpoint name; of tied ones the first, which is what transformers reads, too.

        Raises EvaluationError where checkpoint and model name them differently.
        """
        state = self.model.state_dict()
        wanted = set(names)
        found: dict[str, Tensor] = {}
        filled: set[int] = set()
        for name, tensor in state.items():
            if name in wanted and tensor.data_ptr() not in filled:
                found[name] = tensor
                filled.add(tensor.data_ptr())
        unknown = [name for name in names if name not in state]
        left = [name for name, tensor in state.items() if tensor.data_ptr() not in filled]
        if unknown or left:
            raise EvaluationError(
                f"the checkpoint's tensors are not those of {type(self.model).__name__}: it lacks "
                f"{', '.join(left[:3]) or 'none'}, the model knows no {', '.join(unknown[:3]) or 'others'}",
                str(self.folder),
                "save the model again with transformers (from_pretrained, then save_pretrained)",
            )
        return found


def _load_model(folder: Path, dtype: str) -> Any:
    config = read_config(folder)
    if not config:
        raise EvaluationError("has no config.json, so it cannot be run", str(folder), "name a model folder")
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise EvaluationError(f"transformers is not installed ({error})", "evaluate", INSTALL) from None
    kind = "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"
    try:
        with quiet():
            return getattr(transformers, kind).from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        what = f"transformers cannot open it as a language model: {str(error).strip().splitlines()[0][:200]}"
        raise EvaluationError(what, str(folder), "evaluate a model that generates text") from error


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        fix = "save its tokenizer there, or name another model's: tokenizer: {source: NAME}"
        raise EvaluationError("holds no tokenizer, so it cannot be evaluated", str(folder), fix)
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        what = f"its tokenizer cannot be opened: {str(error).strip().splitlines()[0][:200]}"
        raise EvaluationError(what, str(folder), "save the tokenizer again with save_pretrained") from error
