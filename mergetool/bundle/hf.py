"""The seam of bundles to transformers: build the base from its config, and read its tokenizer.

There are two more: `evaluate.model` opens whole language models, `arch.auto` builds networks to trace them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.bundle.pieces import Piece, marks, pieces_of, whole_of
from mergetool.errors import SourceError
from mergetool.tensors.dtypes import of_torch
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import open_model

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
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    """What parameters are made of that are no single tensor there."""


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
        return _loaded(model, open_model(folder).specs)


def class_in(folder: Path, architecture: str) -> tuple[Any, Any]:
    """A class of transformers, and its config from a folder. Raises SourceError where this transformers lacks it."""
    kind = getattr(transformers, architecture, None)
    if kind is None:
        what = f"transformers {transformers.__version__} has no {architecture}"
        raise SourceError(what, str(folder), "install the version that the expert was made with")
    config = kind.config_class.from_pretrained(folder)
    config.use_cache = False  # nothing here is generated
    return kind, config


def load_class(kind: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> LoadedBase:
    """A model of a class with these tensors, under the names of its checkpoint. Raises SourceError if some lack."""
    with _quiet():
        state = dict(tensors)
        model, told = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if wrong := sorted(str(each) for each in told["mismatched_keys"]):
            what = f"tensors of other shapes than its config.json says: {wrong[0]}"
            raise SourceError(what, where, "save the expert whole, with save_pretrained")
        if missing := sorted(told["missing_keys"]):
            what = f"{len(missing)} tensors of {kind.__name__} are neither in the base nor in the expert: {missing[0]}"
            raise SourceError(what, where, "save the expert whole, with save_pretrained")
        specs = {name: TensorSpec(name, of_torch(value.dtype), tuple(value.shape)) for name, value in tensors.items()}
        return _loaded(model.eval(), specs)


def empty_model(kind: Any, like: Any, config: Any) -> Any:
    """A model of a class without any memory, computing as another one of its class does."""
    with _quiet(), torch.device("meta"):
        return kind._from_config(config, dtype=like.dtype, attn_implementation=like.config._attn_implementation).eval()


def _loaded(model: Any, checkpoint: Mapping[str, TensorSpec]) -> LoadedBase:
    """A model, and where everything in its checkpoint went.

    transformers renames tensors while it loads them, and joins and divides some, differently in every version. So a
    checkpoint of marks is loaded, and they tell where each tensor went (see `mergetool.bundle.pieces`).
    """
    prefix = f"{model.base_model_prefix}."
    names = {}
    for name in _tensors(model):
        same = (each for each in (name, prefix + name, name.removeprefix(prefix)) if each in checkpoint)
        if stored := next(same, None):
            names[name] = stored
    if set(names.values()) == set(checkpoint):
        return LoadedBase(model, names)
    shapes = {name: spec.shape for name, spec in checkpoint.items()}
    unknown = [name for name, value in _tensors(model).items() if name not in names and value.numel()]
    numbers = _probe(model, marks(shapes, 0), unknown)
    names |= {name: stored for name in unknown if (stored := whole_of(shapes, numbers[name])) is not None}
    if not (rest := [name for name in unknown if name not in names]):
        return LoadedBase(model, names)
    digits = [numbers, *(_probe(model, marks(shapes, digit), rest) for digit in (1, 2))]
    pieces = {name: pieces_of(shapes, [each[name] for each in digits]) for name in rest}
    return LoadedBase(model, names, {name: made for name, made in pieces.items() if made})


def _tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _probe(model: Any, marked: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a model of this class, loaded from marks."""
    probe = type(model).from_pretrained(None, config=model.config, state_dict=marked, dtype=torch.float32)
    found = _tensors(probe)
    return {name: found[name].detach().float() for name in wanted}


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


def load_tokenizer(folder: Path, *others: Path) -> Any:
    """The tokenizer of a folder, or of another one where this has none that can pad. Raises SourceError without any."""
    fix = "give tensors instead of text, or add the tokenizer's files"
    having = [place for place in (folder, *others) if any((place / name).is_file() for name in _VOCABULARIES)]
    if not having:  # transformers would make an empty one up
        raise SourceError(f"has no tokenizer (looked for {', '.join(_VOCABULARIES)})", str(folder), fix)
    try:
        found = [transformers.AutoTokenizer.from_pretrained(place) for place in having[:2]]
    except (OSError, ValueError, KeyError) as error:
        what = f"transformers cannot read its tokenizer ({str(error).splitlines()[0][:100]})"
        raise SourceError(what, str(having[0]), fix) from None
    return next((each for each in found if each.pad_token is not None), found[0])
