"""Check a finished output: digests against its lock, and every weight for being finite."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from mergetool.checkpoints.adapters import AdapterAlone
from mergetool.checkpoints.adapters.files import open_weights
from mergetool.checkpoints.adapters.settings import CONFIG_NAME
from mergetool.checkpoints.agreement import disagreements_with_files
from mergetool.errors import SourceError
from mergetool.outputs.opening import open_and_run
from mergetool.outputs.record import INFINITE, NOT_FINITE
from mergetool.outputs.staging import LOCK_NAME
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of, sha256_file
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource

_CHUNK = 1 << 24


def verify_output(path: Path, *, load: bool = False) -> dict[str, Any]:
    """Re-hash against `mergetool.json` (if there is one), hold config.json against the tensors, and scan them.

    With `load`, transformers opens it and runs one step. Raises SourceError for the first kind of damage.
    """
    if results := _results(path / LOCK_NAME):
        return _verified_together(path, results, load=load)
    source = _opened_adapter(path, load=load) if (path / CONFIG_NAME).is_file() else open_model(path)
    lock_path = path / LOCK_NAME
    checked = _check_lock(lock_path) if lock_path.is_file() else None
    _check_config(source, path)
    noted = _notes(lock_path) if lock_path.is_file() else {}
    broken = [name for name in source.specs if not _is_sound(source, name, noted.get(name, ()))]
    if broken:
        raise SourceError(
            f"{len(broken)} tensors hold values that are not finite: {', '.join(broken[:5])}",
            str(path),
            "merge again from sound inputs",
        )
    opened = f"; {open_and_run(path)}" if load else ""
    files = "no lock, so no digests to compare" if checked is None else f"{checked} files match the lock"
    return {
        "path": str(path),
        "files_checked": checked,
        "tensors": len(source.specs),
        "summary": f"{files}; {len(source.specs)} tensors are finite{opened}",
    }


def _results(lock_path: Path) -> list[str]:
    """The folders of a sweep, as its lock has them."""
    try:
        return [str(name) for name in json.loads(lock_path.read_text("utf-8")).get("results", ())]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []  # what is wrong with it will be said


def _verified_together(path: Path, results: Sequence[str], *, load: bool) -> dict[str, Any]:
    """All results of a sweep."""
    checked = _check_lock(path / LOCK_NAME)
    if any(Path(name).name != name for name in results):
        raise SourceError("the lock names results that are not in this folder", str(path / LOCK_NAME), "merge again")
    each = [verify_output(path / name, load=load) for name in results]
    summary = f"{len(each)} results, {checked} files match the lock; {each[0]['summary']} in each"
    return {**each[0], "path": str(path), "files_checked": checked, "results": list(results), "summary": summary}


def _opened_adapter(path: Path, *, load: bool) -> ModelSource:
    """The tensors of an adapter, whose settings say what each of them is. Raises SourceError where they do not."""
    if load:
        what, fix = "is a LoRA adapter, which transformers cannot open by itself", "leave --load out"
        raise SourceError(what, str(path), fix)
    AdapterAlone(path).close()
    return open_weights(path)


def _check_config(source: ModelSource, path: Path) -> None:
    """Raise SourceError where config.json or the tokenizer speak of other tensors than those that are here."""
    problems = list(disagreements_with_files(source, read_config(source.folder)))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SourceError(f"{problems[0]}{more}", str(path), "correct config.json, or merge again")


def _notes(lock_path: Path) -> dict[str, list[str]]:
    """Remarks of the run on single tensors."""
    notes = json.loads(lock_path.read_text("utf-8")).get("notes")
    return notes if isinstance(notes, dict) else {}


def _check_lock(lock_path: Path) -> int:
    try:
        files = json.loads(lock_path.read_text("utf-8"))["output"]["files"]
        expected = {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError("the lock cannot be read", str(lock_path), "merge again") from None
    for name, digest in expected.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise SourceError(f"the lock names {name!r}, which is not in this folder", str(lock_path), "merge again")
        FileStamp.of(lock_path.parent / name)  # refuses what is no file
        actual = sha256_file(lock_path.parent / name)
        if actual != digest:
            what = f"SHA-256 is {actual[:12]}..., the lock says {digest[:12]}..."
            raise SourceError(what, str(lock_path.parent / name), "the file was changed or damaged; merge again")
    return len(expected)


def _is_sound(source: ModelSource, name: str, notes: Collection[str]) -> bool:
    """Whether all values of a tensor are finite, but for what the run was told to write, or found in all models."""
    spec = source.specs[name]
    if not spec.dtype.is_float or NOT_FINITE in notes:
        return True
    wrong = torch.isnan if INFINITE in notes else _is_not_finite
    itemsize = spec.dtype.bits // 8
    for begin in range(0, spec.num_bytes, _CHUNK):
        stored = torch.empty(min(_CHUNK, spec.num_bytes - begin), dtype=torch.uint8)
        source.read_bytes(name, begin, bytes_of(stored))
        assert len(stored) % itemsize == 0
        values = stored.view(torch_dtype(spec.dtype))
        if bool(wrong(values if itemsize > 1 else values.float()).any()):
            return False
    return True


def _is_not_finite(values: torch.Tensor) -> torch.Tensor:
    return ~torch.isfinite(values)
