"""A language model held in memory to be evaluated again and again, while its weights change under it.

The model is built once from a folder; `slots` are its live tensors by their names in the checkpoint, to be overwritten
in place (tied tensors share memory, so writing one writes both).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergetool.errors import EvaluationError, SourceError
from mergetool.evaluate.harness import wrapped
from mergetool.networks.build import load_class, load_language_model
from mergetool.networks.places import Shapes, places_of
from mergetool.networks.spread import Spread, input_device
from mergetool.networks.tokenizer import load_tokenizer


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
        spread: Spread | None = None,
        written: bool = False,
    ) -> None:
        """`spread`: dealt out over devices, memory and the disk; where it is to be `written`, from memory."""
        self.folder = folder
        self.tokenizer_folder = tokenizer or folder
        self.model = load_language_model(folder, dtype, None if written else spread).eval()
        self._state: Mapping[str, Tensor] | None = None
        if spread is None:
            self.model.to(device)
        elif written:
            self._state = spread.dealt(self.model)
        fix = "save its tokenizer there, or name another model's: tokenizer: {source: NAME}"
        self.tokenizer = load_tokenizer(self.tokenizer_folder, kind=EvaluationError, fix=fix)
        self.device = input_device(self.model)
        self._batch_size, self._tokens = batch_size, dict[Any, list[int]]()
        self._wrap()

    def _wrap(self) -> None:
        self.lm = wrapped(self.model, self.tokenizer, self._batch_size, self.device, self._tokens)

    def become(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Be another network of the same kind: one with this config.json and these tensors, by checkpoint name.

        Raises EvaluationError where transformers cannot open it.
        """
        kind, dtype = type(self.model), self.model.dtype
        self.model = None  # there may be no room for both
        try:
            loaded = load_class(kind, kind.config_class.from_dict(dict(config)), tensors, dtype, "candidate")
        except (SourceError, ValueError, KeyError) as error:
            raise EvaluationError(f"transformers cannot open it: {error}", "candidate", "try other settings") from error
        self.model = loaded.model.to(self.device)
        self._wrap()

    def slots(self, shapes: Shapes) -> Mapping[str, Tensor]:
        """Live tensors by checkpoint name; of tied ones the first, which is what transformers reads, too.

        Raises EvaluationError where the model has no place for a tensor, or the checkpoint leaves one of its unfilled.
        """
        places, slots = places_of(self.model, shapes), dict[str, Tensor]()
        state, filled = self._state or self.model.state_dict(), set[int]()
        for name, tensor in state.items():
            if tensor.data_ptr() not in filled and (views := places.views(name, tensor, shapes)):
                slots |= views
                filled.add(tensor.data_ptr())
        left = [name for name, tensor in state.items() if tensor.data_ptr() not in filled]
        unknown = [name for name in shapes if name not in {*slots, *places.names.values()}]
        if unknown or left:
            raise EvaluationError(
                f"the checkpoint's tensors are not those of {type(self.model).__name__}: it lacks "
                f"{', '.join(left[:3]) or 'none'}, the model knows no {', '.join(unknown[:3]) or 'others'}",
                str(self.folder),
                "save the model again with transformers (from_pretrained, then save_pretrained)",
            )
        return slots
