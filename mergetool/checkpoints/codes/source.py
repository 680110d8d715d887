"""A model of quantised weights, seen as the model that it stands for: weights are made slice by slice when read.

They are handed on in float32, and stored as the model was before: nothing is rounded but the result. What goes with the
codes alone (scales, tables, scales of activations) is left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.checkpoints.codes.base import Reader, Weight
from mergetool.checkpoints.codes.blocks import find_blocks
from mergetool.checkpoints.codes.fours import find_fours
from mergetool.checkpoints.codes.nibbles import find_nibbles
from mergetool.checkpoints.codes.packed import find_packed
from mergetool.checkpoints.codes.scaled import find_scaled
from mergetool.checkpoints.facts import QUANTISED, parts_of
from mergetool.tensors.dtypes import BY_NAME, BY_TORCH_NAME, DType
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource

_TOLD = "are quantised: they are dequantised while they are read"
_FLOAT32 = BY_NAME["F32"]
_ABOUT_ACTIVATIONS = re.compile(
    r"(.+\.)?(input|output|activation|k|v|q|kv|input_global)_(scale|zero_point|observer)(_inv)?|(.+\.)?weight_format|scaled_fp8"
)
"""What only arithmetic with codes needs."""


class DequantisedModel(ModelSource):
    """`model` with `weights` in place of their codes."""

    def __init__(self, model: ModelSource, weights: Mapping[str, Weight], dtype: DType) -> None:
        self._model, self._weights, self._dtype = model, weights, dtype
        self._reader = Reader(model)
        self.folder, self.stem = model.folder, model.stem
        told = f"{len(weights)} weights {_TOLD}"
        self.remarks = (*model.remarks, told)
        used = {name for weight in weights.values() for name in weight.uses}
        plain = {n: s for n, s in model.specs.items() if n not in used and not _ABOUT_ACTIVATIONS.fullmatch(n)}
        made = {name: TensorSpec(name, _FLOAT32, weight.shape) for name, weight in weights.items()}
        self.specs: Mapping[str, TensorSpec] = {**plain, **made}

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._model.files

    def stored_as(self, name: str) -> DType:
        return self._dtype if name in self._weights else self._model.stored_as(name)

    def position(self, name: str) -> tuple[int, int]:
        return self._model.position(self._weights[name].codes if name in self._weights else name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if name not in self._weights:
            self._model.read_bytes(name, begin, buffer)
            return
        import torch

        self._weights[name].read(self._reader, begin // 4, torch.frombuffer(buffer, dtype=torch.float32))

    def will_need(self, name: str, begin: int, length: int) -> None:
        if name not in self._weights:
            self._model.will_need(name, begin, length)
            return
        codes = self._model.specs[self._weights[name].codes]
        share = codes.num_bytes / max(1, self.specs[name].num_bytes)
        self._model.will_need(codes.name, int(begin * share), int(length * share))

    def close(self) -> None:
        self._model.close()


def dequantised(model: ModelSource) -> ModelSource:
    """`model` with every weight dequantised whose codes are understood; itself where there is none."""
    settings = quantisation_of(model)
    weights = {each.name: each for each in _found(model, settings)}
    return DequantisedModel(model, weights, _dtype_before(model, weights)) if weights else model


def _found(model: ModelSource, settings: Mapping[str, Any]) -> Iterator[Weight]:
    yield from find_scaled(model.specs, settings)
    yield from find_blocks(Reader(model))
    yield from find_fours(Reader(model))
    yield from find_nibbles(model.specs)
    yield from find_packed(Reader(model), settings)


def is_dequantised(model: ModelSource) -> bool:
    """Whether a model, or the one that this is a view of, was quantised."""
    return any(_TOLD in remark for remark in model.remarks)


def quantisation_of(model: ModelSource) -> Mapping[str, Any]:
    """What config.json says of the codes."""
    config = read_config(model.folder)
    for part in (config, *parts_of(config).values()):
        for key in QUANTISED:
            if isinstance(part.get(key), dict):
                return part[key]  # type: ignore[no-any-return]
    return {}


def _dtype_before(model: ModelSource, weights: Mapping[str, Weight]) -> DType:
    """How the weights were stored before: as config.json says, else as most of what was left alone is."""
    config = read_config(model.folder)
    for part in (config, *parts_of(config).values()):
        for key in ("dtype", "torch_dtype"):
            known = BY_TORCH_NAME.get(str(part.get(key)).removeprefix("torch."))
            if known is not None and known.is_float and known.bits in (16, 32):
                return known
    used = {name for weight in weights.values() for name in weight.uses}
    sizes: dict[DType, int] = {}
    for name, spec in model.specs.items():
        if name not in used and spec.dtype.is_float and spec.dtype.bits in (16, 32):
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_elements
    return max(sizes, key=lambda dtype: sizes[dtype], default=BY_NAME["BF16"])
