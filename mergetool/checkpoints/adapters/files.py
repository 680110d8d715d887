"""The weights of an adapter: `adapter_model.safetensors`, or the older `adapter_model.bin`, as PEFT looks for them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from mergetool.checkpoints.adapters.changes import Added, LowRank
from mergetool.errors import SourceError
from mergetool.tensors.pickled import PickledSource
from mergetool.tensors.source import NOTHING, ModelSource, OpenFile, SafetensorsSource

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"


def open_weights(folder: Path, elsewhere: Mapping[Path, OpenFile] = NOTHING) -> ModelSource:
    """The tensors of an adapter. Raises SourceError where there are none."""
    if folder / WEIGHTS_NAME in elsewhere or (folder / WEIGHTS_NAME).is_file():
        return SafetensorsSource([folder / WEIGHTS_NAME], None, None, elsewhere)
    if (folder / PICKLED_NAME).is_file():
        return PickledSource.open([folder / PICKLED_NAME], folder)
    what = f"there is no {WEIGHTS_NAME} and no {PICKLED_NAME}"
    raise SourceError(what, str(folder), "name the folder that model.save_pretrained wrote the adapter to")


def changes_nothing(adapter: ModelSource, terms: Iterable[LowRank | Added], folder: Path) -> tuple[str, ...]:
    """A warning where every product is zero: an adapter as it is before training."""
    products = {(term.a, term.b) if isinstance(term, LowRank) else (term.own,) for term in terms}
    if not all(stamp.path.is_file() for stamp in adapter.files):  # only its header was fetched
        return ()
    if any(not any(_is_all_zero(adapter, half) for half in halves) for halves in sorted(products)):
        return ()
    return (f"{folder} changes nothing: all its products are zero, as before training",)


def _is_all_zero(source: ModelSource, name: str) -> bool:
    """Whether a tensor holds nothing but zeros, by its bytes."""
    size = source.specs[name].num_bytes
    for begin in range(0, size, 1 << 20):
        block = bytearray(min(1 << 20, size - begin))
        source.read_bytes(name, begin, memoryview(block))
        if block != bytes(len(block)):
            return False
    return True
