"""A quantised model as plain weights, by the library that quantised it.

There are more ways to store codes than anyone can read, and transformers opens most of them. What a layer does to the
unit vectors is its weight, however it is stored: so each layer is asked.
"""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.errors import OutputError, SourceError
from mergetool.networks.library import class_of, first_line, quiet
from mergetool.tensors.side_files import read_config

_ROWS = 1024
"""Unit vectors that go through a layer at once."""
_LINEAR = 0.1
"""Activations in 8 bits move an answer by a tenth of this."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_FIX = "merge the model that it was made from"


def dequantise(folder: Path, target: Path) -> Path:
    """Write a quantised model of transformers as plain weights, with the files beside them.

    Raises SourceError for what does not open, or cannot be told; OutputError where `target` is there.
    """
    if target.exists():
        raise OutputError("already exists", str(target), "choose another -o")
    kind = class_of(read_config(folder), str(folder))
    with quiet(), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        model = _opened(kind, folder)
        plain = _plain(kind, model, _state(model, str(folder)), str(folder))
    started = target.with_name(f"{target.name}.partial")
    shutil.rmtree(started, ignore_errors=True)  # of a run that was killed
    try:
        _write(plain, folder, started)
        started.rename(target)
    except OSError as error:
        shutil.rmtree(started, ignore_errors=True)
        raise OutputError(f"cannot be written ({error.strerror})", str(target), "choose another -o") from None
    return target


def _write(plain: Any, folder: Path, target: Path) -> None:
    plain.save_pretrained(target)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not _is_about_weights(path.name) and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _is_about_weights(name: str) -> bool:
    return name.endswith((*_WEIGHTS, ".index.json")) or "quant" in name


def _opened(kind: Any, folder: Path) -> Any:
    where = "auto" if torch.cuda.is_available() else None
    try:
        return kind.from_pretrained(folder, dtype="auto", device_map=where).eval()
    except (ImportError, OSError, ValueError, RuntimeError, KeyError) as error:
        what = f"transformers does not open it here ({first_line(error)})"
        raise SourceError(what, str(folder), f"install what it asks for; or {_FIX}") from None


def _state(model: Any, where: str) -> dict[str, Tensor]:
    """All tensors of a model, with weights in place of codes."""
    held = {name: module for name, module in model.named_modules() if _is_quantised(module)}
    if not held:
        raise SourceError("none of its layers is quantised", where, "merge it as it is")
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in held)
    }
    for name, module in held.items():
        state[f"{name}.weight"] = _weight(module, model.dtype)
        if (bias := getattr(module, "bias", None)) is not None:
            state[f"{name}.bias"] = bias
    return {name: value.detach().to("cpu") for name, value in state.items()}


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer without a plain weight."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.dtype.itemsize > 1
    return type(module) is not nn.Linear or not plain


def _weight(module: Any, dtype: torch.dtype) -> Tensor:
    """What a layer does to unit vectors, (outputs, inputs)."""
    device = next((each.device for each in (*module.parameters(), *module.buffers())), None)
    rows = [module(units[None].to(device=device, dtype=dtype))[0] for units in _units(module.in_features)]
    moved = torch.cat([each.to("cpu") for each in rows])
    weight = (moved if module.bias is None else moved - module.bias.to("cpu")).T.contiguous()
    asked = torch.randn(8, module.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    answer = module(asked[None].to(device=device))[0].to("cpu").float()
    expected = nn.functional.linear(asked, weight, None if module.bias is None else module.bias.to("cpu")).float()
    if float((answer - expected).norm()) > _LINEAR * float(expected.norm()):
        raise SourceError(f"{type(module).__name__} does more than a matrix", "dequantise", _FIX)
    return weight


def _units(count: int) -> Iterator[Tensor]:
    for start in range(0, count, _ROWS):
        units = torch.zeros(min(_ROWS, count - start), count)
        units[:, start:].fill_diagonal_(1.0)
        yield units


def _plain(kind: Any, model: Any, state: dict[str, Tensor], where: str) -> Any:
    """A model of the same class with these tensors."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = kind._from_config(config, dtype=model.dtype)
    told = plain.load_state_dict(state, strict=False)
    tied = set(getattr(plain, "all_tied_weights_keys", None) or ())
    if wrong := sorted({*told.missing_keys} - tied) + sorted(told.unexpected_keys):
        raise SourceError(f"what {wrong[0]} is cannot be told by asking linear layers", where, _FIX)
    plain.tie_weights()
    return plain
