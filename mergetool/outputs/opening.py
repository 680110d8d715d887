"""Open a result as its users will: with transformers, by the class that config.json names, and run it once."""

from pathlib import Path
from typing import Any

from mergetool.errors import SourceError
from mergetool.tensors.side_files import read_config

_MERGE_AGAIN = "merge again; `mergetool plan` tells what does not fit"


def open_and_run(path: Path) -> str:
    """Load a checkpoint, refuse what transformers misses or does not know, and run one step; a summary for people.

    Raises SourceError.
    """
    try:
        import torch
        import transformers
    except ImportError:
        what = "is opened with transformers, which is not installed"
        raise SourceError(what, str(path), "pip install 'mergetool[eval]'") from None
    names = read_config(path).get("architectures")
    kind: Any = getattr(transformers, str(names[0]), None) if names else transformers.AutoModel
    if kind is None:
        what = f"transformers {transformers.__version__} has no {names[0]}" if names else "config.json names no class"
        raise SourceError(what, str(path), "use the version that the model was made with")
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SourceError(f"does not open ({_first_line(error)})", str(path), _MERGE_AGAIN) from None
    for words in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info.get(words) or ())):
            what = f"{len(found)} {words.replace('_', ' ')} in {type(model).__name__}: {', '.join(found[:5])}"
            raise SourceError(what, str(path), _MERGE_AGAIN)
    return _step(model.eval(), path)


def _step(model: Any, path: Path) -> str:
    import torch

    name = type(model).__name__
    try:
        inputs = _inputs(model)
        with torch.no_grad():
            output = model(**inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"opens as {name}; no step was run ({_first_line(error)})"
    floats = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not all(bool(torch.isfinite(value).all()) for value in floats):
        raise SourceError(f"one step of {name} gives values that are not finite", str(path), "merge again")
    return f"opens as {name} and runs"


def _inputs(model: Any) -> dict[str, Any]:
    """A small batch of the kind that the model names as its main input."""
    import torch

    config, kind = model.config, model.main_input_name
    if kind == "pixel_values":
        size = getattr(config, "image_size", 64)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {kind: torch.rand(1, getattr(config, "num_channels", 3), height, width)}
    if kind == "input_features":
        length = 2 * getattr(config, "max_source_positions", 50)
        inputs = {kind: torch.rand(1, config.num_mel_bins, length)}
    elif kind == "input_values":
        inputs = {kind: torch.rand(1, 16000)}
    else:
        inputs = {kind: torch.arange(1, 7).remainder(config.get_text_config().vocab_size)[None]}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(1, 2, dtype=torch.long)
    return inputs


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
