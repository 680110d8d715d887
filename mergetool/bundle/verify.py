"""Is a bundle what its manifest says? Files, hashes, the base, and whether all numbers are finite."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergetool.bundle.alike import alike
from mergetool.bundle.calibration import read_calibration
from mergetool.bundle.examples import Examples
from mergetool.bundle.manifest import ClassHead, Head, Manifest, read_manifest
from mergetool.errors import SourceError
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import sha256_file

_AGAIN = "the file was changed or damaged; make the bundle again"


def base_folder(folder: Path, manifest: Manifest) -> Path:
    """Where the base's checkpoint lies."""
    place = Path(manifest.base.path)
    return folder / place if manifest.base.kind == "copy" else place


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> int:
    """Every file is there and, with `hashes`, unchanged; returns how many. Raises SourceError."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            what = "a head is missing" if name.startswith("heads/") else "a file of the bundle is missing"
            raise SourceError(what, str(path), "put it back, or make the bundle again")
        if hashes and (digest := sha256_file(path)) != expected:
            raise SourceError(f"SHA-256 is {digest[:12]}..., the manifest says {expected[:12]}...", str(path), _AGAIN)
    return len(manifest.files)


def check_base(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """The base is there and, with `hashes`, the one that the factors were made for. Raises SourceError."""
    place = base_folder(folder, manifest)
    for name, expected in manifest.base.files.items():
        path = place if place.is_file() else place / name
        if not path.is_file():
            what = f"the base's file {name} is missing"
            raise SourceError(what, str(place), "put the base back, or make the bundle again with base: copy")
        if hashes and (digest := sha256_file(path)) != expected:
            what = f"this is another base: SHA-256 is {digest[:12]}..., the factors were made for {expected[:12]}..."
            raise SourceError(what, str(path), "put the right base there, or make the bundle again")


def check_shapes(folder: Path, manifest: Manifest) -> None:
    """Tensors have the shapes that the manifest says, unless they are stored as codes. Raises SourceError."""
    specs = open_model(base_folder(folder, manifest)).specs
    for name, parameter in manifest.parameters.items():
        spec = specs.get(name)
        if spec is not None and spec.dtype.is_float and spec.shape != parameter.shape:
            what = f"the manifest says that {name} is {list(parameter.shape)}, in the base it is {list(spec.shape)}"
            raise SourceError(what, str(folder), "make the bundle again")


def verify_bundle(folder: Path) -> dict[str, Any]:
    """Everything above, and a scan for values that are not finite. Raises SourceError for the first kind of damage."""
    manifest = read_manifest(folder)
    num_files = check_files(folder, manifest, hashes=True)
    Examples.read(folder, read_calibration(folder))
    check_base(folder, manifest, hashes=True)
    check_shapes(folder, manifest)
    num_tensors = 0
    for name in manifest.files:
        if name.endswith(".safetensors"):
            num_tensors += _scan(folder / name)
    return {
        "path": str(folder),
        "files_checked": num_files,
        "tensors": num_tensors,
        "summary": f"{num_files} files match the manifest; {num_tensors} tensors are finite",
    }


def _scan(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                values = file.get_tensor(name)
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    raise SourceError("holds values that are not finite", f"{path}: {name}", "make the bundle again")
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot be read ({str(error)[:100]})", str(path), _AGAIN) from None
    return len(names)


def facts_about_bundle(folder: Path) -> dict[str, Any]:
    """What a bundle holds and how large it is, JSON-able. Raises SourceError."""
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=False)
    place = base_folder(folder, manifest)
    base = open_model(place)
    base_bytes = sum(spec.num_bytes for spec in base.specs.values())
    factor_bytes = {task.name: (folder / task.factors).stat().st_size for task in manifest.tasks}
    others = [name for name in manifest.files if not name.startswith(("base/", "factors/"))]
    beside = sum(factor_bytes.values()) + sum((folder / name).stat().st_size for name in others)
    policies = [parameter.policy for parameter in manifest.parameters.values()]
    return {
        "path": str(folder),
        "kind": manifest.kind,
        "base": f"{manifest.base.kind}: {place}",
        "base_bytes": base_bytes,
        "factor_bytes": factor_bytes,
        "bytes_beside_base": beside,
        "size_over_base": round((base_bytes + beside) / base_bytes, 4),
        "dtype": manifest.dtype,
        "tensors": {
            policy: policies.count(policy)
            for policy in ("svd", "full", "mask", "skip")
            if policy in policies or policy != "mask"
        },
        "calibrated": read_calibration(folder) is not None,
        "router": None if manifest.router is None else _router_facts(manifest),
        "tasks": [_task_facts(folder, manifest, place) for place in range(len(manifest.tasks))],
        "alike": [asdict(pair) for pair in alike(folder, manifest)],
        "interference": {
            name: parameter.interference
            for name, parameter in manifest.parameters.items()
            if parameter.interference is not None
        },
    }


def _task_facts(folder: Path, manifest: Manifest, place: int) -> dict[str, Any]:
    """What one expert is, and what it costs."""
    task = manifest.tasks[place]
    ranks = [parameter.ranks[place] for parameter in manifest.parameters.values() if parameter.ranks]
    return {
        "name": task.name,
        "source": task.source,
        "bytes": (folder / task.factors).stat().st_size,
        "rank": max(ranks, default=0),
        "directions": sum(ranks),
        "classes": None if task.head is None else task.head.num_classes,
        "head": _head_facts(task.head),
        "head_bytes": 0 if task.head is None else _head_bytes(folder, task.head),
        "pool": task.head.pool if isinstance(task.head, Head) else None,
    }


def _head_bytes(folder: Path, head: Head | ClassHead) -> int:
    """Of its tensors and, for a class, what lies beside them."""
    path = folder / head.file
    files = path.parent.iterdir() if isinstance(head, ClassHead) else (path,)
    return sum(file.stat().st_size for file in files)


def _head_facts(head: Head | ClassHead | None) -> str | None:
    return head.architecture if isinstance(head, ClassHead) else None if head is None else "matrix"


def _router_facts(manifest: Manifest) -> dict[str, Any]:
    assert manifest.router is not None
    facts = manifest.router.model_dump(exclude={"matrices"}, exclude_none=True)
    return {"matrices": len(manifest.router.matrices), **facts}
