"""Rows of images: files of numpy with what the model takes, (channels, height, width), as it was trained with."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError, SourceError
from mergetool.statistics.examples import Example, class_of_row
from mergetool.statistics.rows import DataRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PATCH = 16
"""The width of a patch where config.json has none."""
_AXES = 3
_SAVE = "write it with numpy.save: what the model's image processor makes of one image, without the axis of a batch"


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether a network takes pixels and nothing else."""
    return "num_channels" in config and "vocab_size" not in config and "text_config" not in config


def image_examples(rows: Sequence[DataRow], config: Mapping[str, Any]) -> tuple[Example, ...]:
    """Rows for a model that takes images. Raises SourceError for a file that holds no image of this model."""
    return tuple(_example(row, config) for row in rows)


def _example(row: DataRow, config: Mapping[str, Any]) -> Example:
    if not isinstance(row.text, str) or row.pair is not None:
        raise SourceError("names no image, and the model takes nothing else", row.place, 'write {"image": "FILE.npy"}')
    path = Path(row.place.rpartition(":")[0]).parent / row.text
    values = read_image(path, row.place)
    _check_shape(values.shape, config, row.place)
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    side = int(config.get("patch_size") or _PATCH)
    patches = (values.shape[1] // side) * (values.shape[2] // side)
    return Example(row.place, {}, class_of_row(row, config), path, digest, 1 + patches)


def read_image(path: Path, place: str) -> "NDArray[Any]":
    """The pixels of a file. Raises SourceError for anything but finite numbers."""
    import numpy as np

    try:
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}", place, "check the path") from None
    except (ValueError, EOFError):
        raise SourceError(f"{path} is no array of numpy", place, _SAVE) from None
    if not (isinstance(values, np.ndarray) and values.dtype.kind in "fiu"):
        raise SourceError(f"{path} holds no numbers", place, _SAVE)
    if not np.isfinite(values).all():
        raise SourceError(f"{path} holds values that are not finite", place, "make that image anew")
    return values.astype(np.float32)


def _check_shape(shape: tuple[int, ...], config: Mapping[str, Any], place: str) -> None:
    size = config.get("image_size") or shape[1:]  # convolutions alone take any
    wanted = (int(config["num_channels"]), *(size if isinstance(size, list | tuple) else (size, size)))
    if tuple(shape) != wanted or len(shape) != _AXES:
        raise SourceError(f"its image is {_words(shape)}, and the model takes {_words(wanted)}", place, _SAVE)


def _words(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def check_length(length: int | None) -> None:
    """Raise PlanError for a length, which cuts texts."""
    if length is not None:
        raise PlanError("length cuts texts, and the model takes images", "calibration.length", "remove it")
