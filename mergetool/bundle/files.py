"""Files of a bundle: tensors laid out first and filled one by one, and models copied byte for byte."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mergetool.checkpoints.side_files import side_files
from mergetool.errors import OutputError, SourceError
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.header import Header, TensorSpec, lay_out
from mergetool.tensors.io import bytes_of, write_error
from mergetool.tensors.sets import is_index
from mergetool.tensors.source import SINGLE_NAME, ModelSource, weight_map
from mergetool.tensors.writer import SlotWriter, make_folder, partial_path

CONFIG_NAME = "config.json"
FIRST_PASS = "first_pass.safetensors"
REFERENCE = "reference.safetensors"
"""Which tokens every task's training has seen, where that is known, for routers that tell unknown inputs."""
SPECTRA = "spectra.safetensors"
"""Singular values that could have been kept, in float64, where `size` decides how many are: what later experts need to
know to share the space fairly."""

COMPARED = "compared.safetensors"
"""Directions that only a router compares inputs with, where it is to see others than those that experts keep."""
SHARED = "shared.safetensors"
"""The change of which every expert has a mask."""


@dataclass(frozen=True)
class _Layout:
    name: str
    prefix: bytes
    header: Header
    sparse: bool = False


class TensorWriter:
    """One safetensors file, laid out first, filled tensor by tensor."""

    def __init__(self, folder: Path, path: str, specs: Sequence[TensorSpec]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        self._specs = {spec.name: spec for spec in specs}
        self._slots = SlotWriter(folder, [_Layout(path, *lay_out(specs, {"format": "pt"}))])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._slots.close()

    def put(self, name: str, values: Tensor) -> None:
        stored = values.to(torch_dtype(self._specs[name].dtype)).cpu().contiguous()
        assert tuple(stored.shape) == self._specs[name].shape, name
        self._slots.write(0, name, 0, bytes_of(stored.reshape(-1)))


def factors_path(task: str) -> str:
    """Where a bundle keeps the factors of a task."""
    return f"factors/{quote(task, safe='')}.safetensors"


def model_files(source: ModelSource) -> dict[str, Path]:
    """A model's weights, index, config and all that belongs to it, by name in a copy."""
    weights = [stamp.path for stamp in source.files]
    if source.folder is None:
        return {single_name(weights[0]): weights[0]}
    files = {path.name: path for path in [*weights, *_index(source.folder, weights)]}
    return files | small_files(source.folder)


def small_files(folder: Path) -> dict[str, Path]:
    """A model's config and tokenizer, by name."""
    config = [CONFIG_NAME] if (folder / CONFIG_NAME).is_file() else []
    return {name: folder / name for name in [*config, *side_files(folder)]}


def copy_files(files: Mapping[str, Path], folder: Path, leaving: Path | None = None) -> None:
    """Byte for byte, under these names. Files of a folder that is `leaving`, once these are there, are only linked.

    Raises OutputError.
    """
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if leaving is None or not _linked(path, folder / name, leaving):
            _copy(path, folder / name)


def _linked(source: Path, target: Path, leaving: Path) -> bool:
    """Whether a file of that folder has got a second name; not all file systems know how."""
    if leaving.resolve() not in source.resolve().parents:  # a link out of it leads to somebody else's file
        return False
    with suppress(OSError):
        target.hardlink_to(source.resolve())
        return True
    return False


def copy_bundle(folder: Path, target: Path) -> None:
    """All files of a bundle into a new folder, which is complete or not there. Raises OutputError."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError("something lies there already", str(target), "give a new folder")
    partial = partial_path(target)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    copy_files(files, partial)
    partial.replace(target)


def single_name(weights: Path) -> str:
    """What a file without a folder of its own is called in the copy of a model."""
    return SINGLE_NAME if weights.suffix == ".safetensors" else "pytorch_model.bin"


def _index(folder: Path, weights: Sequence[Path]) -> list[Path]:
    """The index of these files."""
    names = {path.name for path in weights}
    indexes = [path for path in sorted(folder.iterdir()) if is_index(path.name)]
    return [path for path in indexes if names == set(weight_map(folder, path.name).values())]


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise write_error(error, str(target)) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises SourceError where what is inside cannot be read."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "the file was changed or damaged; make the bundle again"
        raise SourceError(f"cannot be read ({str(error)[:100]})", str(path), fix) from None


def read_all(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises SourceError."""
    with readable(path):
        return load_file(path)


def triplet_names(name: str) -> tuple[str, str, str]:
    """What the file of a task calls U, S and Vh of its change of a tensor."""
    return f"{name}.U", f"{name}.S", f"{name}.Vh"


def whole_name(name: str) -> str:
    """What the file of a task calls its change of a tensor that is kept in full."""
    return f"{name}.delta"


def spectrum_key(task: int, name: str) -> str:
    """What `SPECTRA` calls the singular values of a task's change of a tensor."""
    return f"{task}.{name}"


MODELING = '''"""Lets transformers' AutoModel open this folder; the code is in the package mergetool."""

from mergetool.bundle.auto import AutoMassModel, MassConfig  # noqa: F401
'''


def bundle_config(base: Mapping[str, object]) -> dict[str, object]:
    """config.json of a bundle: its own model type, with the base's config inside."""
    return {
        "model_type": "mass",
        "architectures": ["AutoMassModel"],
        "auto_map": {"AutoConfig": "modeling_mass.MassConfig", "AutoModel": "modeling_mass.AutoMassModel"},
        "base_config": dict(base),
    }
