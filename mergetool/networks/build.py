"""Models of transformers: from a folder, from tensors, or empty, with what their parameters are called on the disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.errors import EvaluationError, SourceError
from mergetool.networks.library import class_of, first_line, library, quiet
from mergetool.networks.places import TensorMap, places_of
from mergetool.networks.spread import Spread
from mergetool.tensors.folder import open_model
from mergetool.tensors.side_files import read_config

_WHOLE = "save the expert whole, with save_pretrained"


@dataclass(frozen=True)
class LoadedModel:
    """A model, and where the tensors of its checkpoint lie in it."""

    model: nn.Module
    places: TensorMap


def load_base(folder: Path, dtype: torch.dtype | None, *, encoder: bool, spread: Spread | None = None) -> LoadedModel:
    """The model that a checkpoint's config.json names, or only its encoder; ready to predict. Raises SourceError."""
    kind = class_of({} if encoder else read_config(folder), str(folder), "base")
    with quiet():
        load = partial(kind.from_pretrained, folder, dtype=dtype or "auto")
        model = (load() if spread is None else spread.opened(load)).eval()
    shapes = {name: spec.shape for name, spec in open_model(folder).specs.items()}
    return LoadedModel(model, places_of(model, shapes))


def class_in(folder: Path, architecture: str) -> tuple[Any, Any]:
    """A class of transformers, and its config from a folder. Raises SourceError where this transformers lacks it."""
    kind = class_of({"architectures": [architecture]}, str(folder), "expert")
    config = kind.config_class.from_pretrained(folder)
    config.use_cache = False  # nothing here is generated
    return kind, config


def load_class(kind: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> LoadedModel:
    """A model of a class with these tensors, under the names of its checkpoint. Raises SourceError if some lack."""
    with quiet():
        state = dict(tensors)
        model, told = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if wrong := sorted(str(each) for each in told["mismatched_keys"]):
        raise SourceError(f"tensors of other shapes than its config.json says: {wrong[0]}", where, _WHOLE)
    if missing := sorted(told["missing_keys"]):
        what = f"{len(missing)} tensors of {kind.__name__} are neither in the base nor in the expert: {missing[0]}"
        raise SourceError(what, where, _WHOLE)
    return LoadedModel(model.eval(), places_of(model, {name: tuple(value.shape) for name, value in tensors.items()}))


def empty_model(kind: Any, like: Any, config: Any) -> Any:
    """A model of a class without any memory, computing as another one of its class does."""
    with quiet(), torch.device("meta"):
        return kind._from_config(config, dtype=like.dtype, attn_implementation=like.config._attn_implementation).eval()


def open_whole(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """A result as its users open it, in float32, and what was missing or unknown. Raises SourceError."""
    kind = class_of(read_config(folder), str(folder))
    try:
        with quiet():
            model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        fix = "merge again; `mergetool plan` tells what does not fit"
        raise SourceError(f"does not open ({first_line(error)})", str(folder), fix) from None
    return model.eval(), told


def load_language_model(folder: Path, dtype: str, spread: Spread | None = None) -> Any:
    """A model that writes text. Raises EvaluationError."""
    config = read_config(folder)
    if not config:
        raise EvaluationError("has no config.json, so it cannot be run", str(folder), "name a model folder")
    transformers = library("evaluating", str(folder), EvaluationError)
    kind = "AutoModelForSeq2SeqLM" if config.get("is_encoder_decoder") else "AutoModelForCausalLM"
    try:
        with quiet():
            load = partial(getattr(transformers, kind).from_pretrained, folder, dtype=dtype, local_files_only=True)
            return load() if spread is None else spread.opened(load)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        what = f"transformers cannot open it as a language model: {first_line(error)}"
        raise EvaluationError(what, str(folder), "evaluate a model that generates text") from error
