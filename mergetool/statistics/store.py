"""Statistics that were measured, each in a file under the hash of all that decides it. Files appear whole, by a rename.

Kept like models: safetensors with tensors under the names of the weights. The header also says which weights share the
statistic of another, and which are stored turned.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

from mergetool.errors import OutputError, SourceError
from mergetool.statistics.base import Found, Statistic
from mergetool.tensors.digests import cache_folder, remembered_sha256
from mergetool.tensors.io import write_error
from mergetool.tensors.source import FileStamp, ModelSource, SafetensorsSource
from mergetool.tensors.writer import write_tensors

if TYPE_CHECKING:
    from mergetool.statistics.examples import Example

SHARED, TURNED = "shared", "turned"
"""What the header calls weights with the statistic of another one, and weights that are stored turned."""
_VERSION = 1
"""Changes when the same data would give another statistic."""
_PIECE = 1 << 24


def key_of(
    statistic: Statistic,
    model: ModelSource,
    config: Mapping[str, Any],
    examples: "Sequence[Example]",
    dtype: str,
    seed: int,
) -> str:
    """SHA-256 of all that decides a statistic: the model by its content, the examples as tokens, the settings."""
    settings = [statistic.name, vars(statistic), dtype, seed if statistic.draws else None]
    told = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    rows = [each.content for each in examples]
    facts = [_VERSION, settings, told, rows, sorted(model.specs), content_of(model)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def content_of(model: ModelSource) -> list[str]:
    """Digests of a model's files where these are all there is to it, else of its tensors as they are read."""
    plain = getattr(model, "model", model)  # a view under other names
    if isinstance(plain, SafetensorsSource):
        return [remembered_sha256(stamp.path) for stamp in plain.files]
    return [_digest(model, name) for name in sorted(model.specs)]


def _digest(model: ModelSource, name: str) -> str:
    digest, size = hashlib.sha256(), model.specs[name].num_bytes
    for begin in range(0, size, _PIECE):
        held = bytearray(min(_PIECE, size - begin))
        model.read_bytes(name, begin, memoryview(held))
        digest.update(held)
    return digest.hexdigest()


class StatisticStore:
    """Statistics on the disk: in a folder that was given, or in the user's cache."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = (folder or cache_folder()) / "statistics"

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def begun(self, key: str) -> Path:
        """The folder where a statistic lies as far as it is measured."""
        return self.folder / f"{key}.begun"

    def has(self, key: str) -> bool:
        """Whether a statistic is there; one that is damaged is not."""
        try:
            FileStamp.of(self.path(key))
            SafetensorsSource([self.path(key)], None)
        except SourceError:
            return False
        return True

    def keep(self, key: str, found: Found, turned: Sequence[str]) -> Path:
        """Write a statistic. Raises OutputError."""
        path = self.path(key)
        sibling = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}")
        told = {SHARED: json.dumps(dict(found.shared)), TURNED: json.dumps(sorted(turned))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            write_tensors(sibling, found.tensors, told)
            sibling.replace(path)
        except OSError as error:
            raise _elsewhere(write_error(error, str(path))) from error
        except OutputError as error:
            raise _elsewhere(error) from error
        finally:
            with suppress(OSError):
                sibling.unlink(missing_ok=True)
        return path


def _sweep(path: Path) -> None:
    """Remove what processes that are gone had begun to write of a statistic."""
    for begun in path.parent.glob(f".{path.name}.*"):
        process = begun.suffixes[-2][1:]
        if process.isdecimal() and not _is_alive(int(process)):
            begun.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def _elsewhere(error: OutputError) -> OutputError:
    return OutputError(error.what, error.where, "free some space, or choose another place with --cache DIR")
