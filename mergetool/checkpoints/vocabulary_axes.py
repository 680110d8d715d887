"""Which tensors of a checkpoint have one entry for every token, and along which axis.

The description of a known architecture says so. Of any other network these are its embeddings, heads of as many rows,
and their biases, as transformers names them.
"""

from collections.abc import Mapping
from typing import Any

from mergetool.arch.match import describe
from mergetool.checkpoints.ties import embeddings_of, is_head
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

Shape = tuple[int, ...]

_SPACE = "vocab"
_BIASES = ("final_logits_bias", "predictions.bias")
_MORE_EMBEDDINGS = ("embed_tokens_per_layer.weight",)


def vocabulary_axes(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, int]:
    """The axis by name of the tensor; nothing for a network without words."""
    axes = {name: 0 for name in embeddings_of(shapes) if len(shapes[name]) == 2}
    rows = {shapes[name][0] for name in axes}
    for name, shape in shapes.items():
        if name.endswith(_MORE_EMBEDDINGS) or (_is_of_head(name) and len(shape) <= 2):
            axis = 1 if len(shape) == 2 and shape[0] == 1 else 0
            if shape and (not rows or shape[axis] in rows):
                axes[name] = axis
    described = describe(shapes, config).axes_in(_SPACE)
    return axes | {name: axis for name, axis in described if axis == 0}


def axes_of(source: ModelSource) -> dict[str, int]:
    """The axes of a model."""
    shapes = {name: spec.shape for name, spec in source.specs.items() if spec.dtype.is_float}
    return vocabulary_axes(shapes, read_config(source.folder))


def _is_of_head(name: str) -> bool:
    weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
    return is_head(weight) or name.endswith(_BIASES)
