"""Opening a model by its path: a file, an index, or a folder in which the right set of weights is found."""

from collections.abc import Mapping
from pathlib import Path

from mergetool.errors import SourceError
from mergetool.tensors.foreign import foreign_file, foreign_folder
from mergetool.tensors.io import read_error
from mergetool.tensors.pickled import PickledSource
from mergetool.tensors.sets import PICKLES, WeightSet, chosen_set, is_index, weight_sets
from mergetool.tensors.side_files import CONFIG_NAME, read_config
from mergetool.tensors.source import NOTHING, WEIGHT_NAMES, ModelSource, OpenFile, SafetensorsSource, weight_map

_ADAPTER_NAME = "adapter_config.json"
NO_MODEL = "write {adapter: ADAPTER} for the base with it, or {source: MODEL, adapters: [ADAPTER]}"
"""The fix where an adapter is named as a model."""


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    names = {each.name for each in path.iterdir() if not each.is_dir()} if path.is_dir() else set()
    return _ADAPTER_NAME in names and not weight_sets(names)


def open_model(path: Path, elsewhere: Mapping[Path, OpenFile] = NOTHING) -> ModelSource:
    """Open a model by path: a file of weights, an index, or a folder, of which the set is read that its library opens.

    Reads headers only (pickles are memory-mapped). `elsewhere` holds headers of files that are not there yet.
    Raises SourceError saying what was looked for, or what lies there instead.
    """
    try:
        return _open(path, elsewhere)
    except OSError as error:  # a name too long, a folder that may not be searched
        raise read_error(error, str(path)) from error


def _open(path: Path, elsewhere: Mapping[Path, OpenFile]) -> ModelSource:
    """What `open_model` does, with errors of the operating system as they are."""
    if path.is_file():
        return _open_file(path)
    if not path.is_dir() and not elsewhere:
        raise SourceError("no such file or folder", str(path), _missing_fix(path))
    return _open_folder(path, elsewhere)


def _open_file(path: Path) -> ModelSource:
    if is_index(path.name):
        return _open_set(path.parent, weight_sets([path.name])[0])
    if path.suffix == ".safetensors":
        known = weight_sets([path.name])
        source = SafetensorsSource([path], path.parent if known and known[0].variant else None)
        source.stem = known[0].stem if known and source.folder else "model"
        return source
    if path.suffix in PICKLES:
        folder = path.parent if weight_sets([path.name]) and (path.parent / CONFIG_NAME).is_file() else None
        return PickledSource.open([path], folder)
    raise foreign_file(path)


def _open_folder(path: Path, elsewhere: Mapping[Path, OpenFile]) -> ModelSource:
    here = list(path.iterdir()) if path.is_dir() else []
    files = {each.name for each in here if not each.is_dir()} | {each.name for each in elsewhere}
    if (explicit := read_config(path).get("transformers_weights")) is not None:
        return _open_set(path, WeightSet(_file_of(explicit, path)))
    weights = None if _ADAPTER_NAME in files and not weight_sets(files) else chosen_set(files, str(path))
    if weights is not None:
        chosen, remark = weights
        return _open_set(path, chosen, remark, elsewhere)
    if _ADAPTER_NAME in files:
        raise SourceError("is a LoRA adapter, not a model", str(path), NO_MODEL)
    folders = {each.name for each in here if each.is_dir()}
    if (known := foreign_folder(path, files, folders)) is not None:
        raise known
    what = f"no model in this folder (looked for {', '.join(WEIGHT_NAMES)})"
    raise SourceError(what, str(path), "name the folder that holds the weights")


def _file_of(name: object, folder: Path) -> str:
    """The file that config.json says holds the weights; transformers opens no other."""
    if not isinstance(name, str) or Path(name).name != name:
        what = f"transformers_weights is {name!r}, which is not a file of this folder"
        raise SourceError(what, str(folder / CONFIG_NAME), "get the model from a source you trust")
    return name


def _open_set(
    folder: Path, chosen: WeightSet, remark: str = "", elsewhere: Mapping[Path, OpenFile] | None = None
) -> ModelSource:
    places = weight_map(folder, chosen.file) if chosen.sharded else None
    names = list(dict.fromkeys(places.values())) if places is not None else [chosen.file]
    paths = [folder / name for name in names]
    if chosen.pickled:
        return PickledSource.open(paths, folder, places, chosen.stem, [remark] if remark else [])
    source = SafetensorsSource(paths, folder, places, elsewhere or {})
    source.stem, source.remarks = chosen.stem, (remark,) if remark else ()
    return source


def _missing_fix(path: Path) -> str:
    if (path.parent / f"{path.name}.partial").is_dir():
        return "this is the output of an unfinished run; run its recipe again first"
    return "check the path; a model on the Hub is written ORG/NAME or ORG/NAME@REVISION"
