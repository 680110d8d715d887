"""Check a finished output: digests against its lock, and every weight for being finite."""

import json
from pathlib import Path
from typing import Any

import torch

from mergetool.engine.claim import LOCK_NAME
from mergetool.errors import SourceError
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of, sha256_file
from mergetool.tensors.source import FileStamp, ModelSource, open_model

_CHUNK = 1 << 24


def verify_output(path: Path) -> dict[str, Any]:
    """Re-hash against `mergetool.json` (if there is one) and scan. Raises SourceError for the first kind of damage."""
    source = open_model(path)
    lock_path = path / LOCK_NAME
    checked = _check_lock(lock_path) if lock_path.is_file() else None
    broken = [name for name in source.specs if not _is_finite(source, name)]
    if broken:
        raise SourceError(
            f"{len(broken)} tensors hold values that are not finite: {', '.join(broken[:5])}",
            str(path),
            "merge again from sound inputs",
        )
    files = "no lock, so no digests to compare" if checked is None else f"{checked} files match the lock"
    return {
        "path": str(path),
        "files_checked": checked,
        "tensors": len(source.specs),
        "summary": f"{files}; {len(source.specs)} tensors are finite",
    }


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
        found = sha256_file(lock_path.parent / name)
        if found != digest:
            what = f"SHA-256 is {found[:12]}..., the lock says {digest[:12]}..."
            raise SourceError(what, str(lock_path.parent / name), "the file was changed or damaged; merge again")
    return len(expected)


def _is_finite(source: ModelSource, name: str) -> bool:
    spec = source.specs[name]
    if not spec.dtype.is_float:
        return True
    itemsize = spec.dtype.bits // 8
    for begin in range(0, spec.num_bytes, _CHUNK):
        stored = torch.empty(min(_CHUNK, spec.num_bytes - begin), dtype=torch.uint8)
        source.read_bytes(name, begin, bytes_of(stored))
        assert len(stored) % itemsize == 0
        values = stored.view(torch_dtype(spec.dtype))
        if not bool(torch.isfinite(values if itemsize > 1 else values.float()).all()):
            return False
    return True
