"""A model, an adapter that PEFT trained and saved, and what PEFT itself makes of the two."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mergetool.checkpoints.adapters import AdapterSource
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Trained:
    """Folders of a model and an adapter, and the tensors of the model that PEFT merged."""

    model: Path
    adapter: Path
    merged: dict[str, torch.Tensor]

    def source(self) -> AdapterSource:
        return AdapterSource(open_model(self.model), self.adapter)

    def settings(self) -> dict[str, Any]:
        return json.loads((self.adapter / "adapter_config.json").read_text())

    def set(self, **fields: Any) -> None:
        (self.adapter / "adapter_config.json").write_text(json.dumps(self.settings() | fields))


@contextmanager
def quiet() -> Iterator[None]:
    """peft warns of much that is meant here, and of transformers' future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def disturb(adapted: torch.nn.Module) -> None:
    """What training does: every trainable parameter moves."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def train(folder: Path, model: torch.nn.Module, *, trained: type | None = None, **settings: Any) -> Trained:
    """Save `model`, train an adapter for it (or for it as class `trained`), merge with PEFT, save what comes out."""
    save(model, folder / "model")
    with quiet():
        start = opened(model, folder / "model", trained)
        adapted = get_peft_model(copy.deepcopy(start), LoraConfig(**settings))
        disturb(adapted)
        adapted.save_pretrained(folder / "adapter")
        return Trained(folder / "model", folder / "adapter", merged_by_peft(folder, start))


def merged_by_peft(folder: Path, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The file that PEFT's merged model is saved as."""
    with quiet():
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        save(merged, folder / "merged")
    return load_file(folder / "merged/model.safetensors")


def save(model: torch.nn.Module, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def opened(model: torch.nn.Module, folder: Path, trained: type | None = None) -> torch.nn.Module:
    """A model opened again; new parts of another class are drawn with one seed."""
    torch.manual_seed(3)
    if hasattr(model, "save_pretrained"):
        return (trained or type(model)).from_pretrained(folder)
    again = type(model)()
    again.load_state_dict(load_file(folder / "model.safetensors"))
    return again


def read_all(source: AdapterSource, name: str, step: int = 37) -> torch.Tensor:
    """A whole tensor as float32, read in slices of `step` elements that do not respect rows."""
    spec = source.specs[name]
    if spec.dtype.name == "I64":
        whole = torch.empty(spec.shape, dtype=torch.int64)
        source.read_bytes(name, 0, bytes_of(whole.reshape(-1)))
        return whole.float()
    assert spec.dtype.name == "F32"
    out = torch.empty(spec.num_elements)
    for start in range(0, spec.num_elements, step):
        source.read_bytes(name, start * 4, bytes_of(out[start : start + step]))
    return out.view(spec.shape)


def assert_merged_as_by_peft(trained: Trained, *, step: int = 37) -> AdapterSource:
    """Every tensor of PEFT's merged file, and no other, to 1e-6; and something did change."""
    source = trained.source()
    before = load_file(trained.model / "model.safetensors")
    assert sorted(source.specs) == sorted(trained.merged)
    for name, wanted in trained.merged.items():
        torch.testing.assert_close(read_all(source, name, step), wanted.float(), rtol=1e-5, atol=1e-6, msg=name)
    assert any(name not in before or not torch.equal(before[name], trained.merged[name]) for name in trained.merged)
    return source
