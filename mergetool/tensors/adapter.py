"""A model with a LoRA adapter, seen as a model: `W + s B A` is computed slice by slice when a tensor is read.

Nothing is materialised: a slice of rows costs one small matrix product. The product is formed in float32 whatever the
storage dtypes, and handed on in float32, so that the adapter's small changes are not rounded away before merging.

Understood: the PEFT layout (adapter_config.json, adapter_model.safetensors) with `r`, `lora_alpha`, `use_rslora`,
`rank_pattern`, `alpha_pattern`, `fan_in_fan_out`, embeddings and `modules_to_save`. Refused: DoRA, trained biases, and
any adapter tensor that has no counterpart in the model.

Reference: Hu et al., LoRA, ICLR 2022, https://arxiv.org/abs/2106.09685, section 4.1; rank-stabilised scaling:
https://arxiv.org/abs/2312.03732.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import SourceError
from mergetool.tensors.dtypes import BY_NAME, DType, torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import bytes_of, read_error
from mergetool.tensors.source import NOTHING, FileStamp, ModelSource, OpenFile, SafetensorsSource

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_FLOAT32 = BY_NAME["F32"]
_FIX = "merge the adapter into its model with peft first (merge_and_unload, save_pretrained)"


@dataclass(frozen=True)
class _LowRank:
    """One adapted weight: `delta = factor * B @ A`, or its transpose."""

    a: str
    b: str
    factor: float
    transposed: bool


class AdapterSource(ModelSource):
    """`model` with one adapter on top. Adapted tensors are float32; the others are as stored."""

    def __init__(self, model: ModelSource, folder: Path, elsewhere: Mapping[Path, OpenFile] = NOTHING) -> None:
        self._model = model
        self._where = str(folder)
        self.folder, self.stem, self.remarks = model.folder, model.stem, model.remarks
        self._settings = _settings(folder)
        self._config = FileStamp.of(folder / CONFIG_NAME)  # its alpha decides about values as much as the weights do
        if folder / WEIGHTS_NAME not in elsewhere and not (folder / WEIGHTS_NAME).is_file():
            raise SourceError(f"there is no {WEIGHTS_NAME}", self._where, "save the adapter as safetensors")
        self._adapter = SafetensorsSource([folder / WEIGHTS_NAME], None, None, elsewhere)
        self._low_rank: dict[str, _LowRank] = {}
        self._replaced: dict[str, str] = {}
        self._match()
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, _FLOAT32, spec.shape) if name in self._low_rank else spec
            for name, spec in model.specs.items()
        } | {
            name: TensorSpec(name, self._adapter.specs[own].dtype, self._adapter.specs[own].shape)
            for name, own in self._replaced.items()
        }

    def stored_as(self, name: str) -> DType:
        return self._model.stored_as(name) if name in self._low_rank else super().stored_as(name)

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return (*self._model.files, *self._adapter.files, self._config)

    def position(self, name: str) -> tuple[int, int]:
        return self._model.position(name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if name in self._replaced:
            self._adapter.read_bytes(self._replaced[name], begin, buffer)
        elif name in self._low_rank:
            self._read_adapted(name, begin // 4, buffer)
        else:
            self._model.read_bytes(name, begin, buffer)

    def will_need(self, name: str, begin: int, length: int) -> None:
        bits = self._model.specs[name].dtype.bits if name in self._low_rank else 32
        if name not in self._replaced:
            self._model.will_need(name, begin * bits // 32, length * bits // 32)

    def close(self) -> None:
        self._model.close()
        self._adapter.close()

    # ------------------------------------------------------------------ reading

    def _read_adapted(self, name: str, start: int, buffer: memoryview) -> None:
        """Elements [start, start + len(buffer) / 4) of `W + factor * B A`, by whole rows of the product."""
        import torch

        out = torch.frombuffer(buffer, dtype=torch.float32)
        spec = self._model.specs[name]
        stored = torch.empty(len(out), dtype=torch_dtype(spec.dtype))
        self._model.read_bytes(name, start * spec.dtype.bits // 8, bytes_of(stored))
        width = spec.shape[1]
        first, last = start // width, -(-(start + len(out)) // width)
        low = self._low_rank[name]
        a, b = self._factor(low.a), self._factor(low.b)  # (r, in), (out, r)
        product = (a.mT[first:last] @ b.mT) if low.transposed else (b[first:last] @ a)
        delta = product.reshape(-1)[start - first * width :][: len(out)]
        out.copy_(stored).add_(delta, alpha=low.factor)

    def _factor(self, name: str) -> "Tensor":
        import torch

        spec = self._adapter.specs[name]
        stored = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        self._adapter.read_bytes(name, 0, bytes_of(stored.reshape(-1)))
        return stored.float()

    # ------------------------------------------------------------------ matching names

    def _match(self) -> None:
        for own in sorted(self._adapter.specs):
            if ".base_layer." in own:  # peft's copy of an embedding that it adapted: the model has it
                continue
            module, kind = _split(own)
            if kind in _HALVES:
                self._add_low_rank(own, module, kind)
            elif kind == "":
                self._replaced[self._counterpart(module, own)] = own
            else:
                raise SourceError(f"{kind} is not supported", f"{self._where}: {own}", _FIX)
        if both := self._low_rank.keys() & self._replaced.keys():
            raise SourceError(f"{min(both)} is both adapted and replaced", self._where, _FIX)
        if not self._low_rank and not self._replaced:
            raise SourceError("the adapter changes nothing", self._where, "save the adapter again")

    def _add_low_rank(self, own: str, module: str, kind: str) -> None:
        where = f"{self._where}: {own}"
        name = self._counterpart(f"{module}.weight", own)
        head, lora, half = own.rpartition("lora_")
        other = head + lora + half.translate(str.maketrans("AB", "BA"))
        if other not in self._adapter.specs:
            raise SourceError(f"{other} is missing", where, _FIX)
        if "_B" in kind:
            return  # A stands for both
        a, b, weight = self._adapter.specs[own], self._adapter.specs[other], self._model.specs[name]
        transposed = "embedding" in kind or self._settings.get("fan_in_fan_out") is True
        if not (a.dtype.is_float and b.dtype.is_float and weight.dtype.is_float):
            what = (
                f"A is {a.dtype.name}, B is {b.dtype.name}, {name} is {weight.dtype.name}; all must be floating point"
            )
            raise SourceError(what, where, _FIX)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise SourceError(f"A is {list(a.shape)}, B is {list(b.shape)}: B A is no matrix", where, _FIX)
        product = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if product != weight.shape:
            raise SourceError(f"B A is {list(product)}, {name} is {list(weight.shape)}", where, _FIX)
        self._low_rank[name] = _LowRank(own, other, self._factor_of(module, a.shape[0]), transposed)

    def _counterpart(self, name: str, own: str) -> str:
        """The model's tensor of this name; checkpoints of a bare base model lack the head model's first name part."""
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._model.specs:
                return candidate
        raise SourceError(
            f"the model has no tensor {name!r}", f"{self._where}: {own}", "use the model it was trained on"
        )

    def _factor_of(self, module: str, rank: int) -> float:
        alpha = _patterned(self._settings["alpha_pattern"], module, self._settings.get("lora_alpha", rank))
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise SourceError(
                f"the alpha of {module} is {alpha!r}, not a number", self._where, "save the adapter again"
            )
        return float(alpha) / (math.sqrt(rank) if self._settings.get("use_rslora") is True else rank)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise read_error(error, str(path)) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not valid JSON ({str(error)[:100]})", str(path), "save the adapter again") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise SourceError("is not a LoRA adapter (peft_type)", str(path), _FIX)
    if settings.get("use_dora") or settings.get("bias", "none") != "none":
        raise SourceError("DoRA and trained biases are not supported", str(path), _FIX)
    try:
        for pattern in settings.get("alpha_pattern") or {}:
            re.compile(pattern)
        return settings | {"alpha_pattern": dict(settings.get("alpha_pattern") or {})}
    except (TypeError, ValueError, re.error):
        raise SourceError(
            "alpha_pattern does not map patterns to numbers", str(path), "save the adapter again"
        ) from None


def _split(own: str) -> tuple[str, str]:
    """(module name in the model, what the tensor is) of an adapter tensor; kind "" is a whole tensor."""
    name = own.removeprefix(_PREFIX)
    match = re.fullmatch(r"(.+)\.(lora_.+)", name)
    if match is None:
        return name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", "."), ""
    return match.group(1), match.group(2).replace(".default", "")


def _patterned(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the module's name, or matches its end after a dot."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
