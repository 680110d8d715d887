"""Compare two bundles: what each expert adds, in how many directions, and which heads and router go with it."""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mergetool.bundle.changes import BundleChanges, slices
from mergetool.kernels.differences import Sums, sums
from mergetool.outputs.difference import Comparison, FileDifference, TensorDifference, added, most_changed_first
from mergetool.outputs.settings_beside import leaves

_FILE = "manifest.json"
_SHORT = 12


def difference_of_bundles(a: str, b: str, workers: int | None = None) -> Comparison:
    """What differs between two bundles; changes are compared, whatever factors they are kept in. Raises SourceError."""
    one, other = BundleChanges(Path(a)), BundleChanges(Path(b))
    names = list(dict.fromkeys([*one.manifest.parameters, *other.manifest.parameters]))
    shapes = {name: [each.shape for each in _parameters(name, one, other)] for name in names}
    alike = [name for name, (first, *more) in shapes.items() if all(shape == first for shape in more)]
    both = [task for task in one.tasks if task in other.tasks]
    asked = [(task, name) for task in both for name in alike]
    with ThreadPoolExecutor(workers or min(32, len(os.sched_getaffinity(0)))) as pool:
        found = pool.map(lambda each: _compared(each[0], each[1], one, other), asked)
        tensors = most_changed_first(found)
    reshaped = tuple((name, shape[0], shape[1]) for name, shape in shapes.items() if name not in alike)
    files = tuple(_settings(one, other, both, alike))
    remarks = () if one.base_digests() == other.base_digests() else ("they are made for two bases",)
    return Comparison(a, b, None, tensors, (), (), reshaped, files, remarks, added(tensors))


def _parameters(name: str, *bundles: BundleChanges) -> Iterator[Any]:
    yield from (each.manifest.parameters[name] for each in bundles if name in each.manifest.parameters)


def _compared(task: str, name: str, one: BundleChanges, other: BundleChanges) -> TensorDifference:
    shape = next(_parameters(name, one, other)).shape
    first, second = one.change(task, name), other.change(task, name)
    total = Sums()
    for start, stop in slices(shape):
        total += sums(first.read(start, stop), second.read(start, stop))
    return TensorDifference(f"{task}: {name}", shape, (one.dtype.name, other.dtype.name), total)


def _settings(one: BundleChanges, other: BundleChanges, both: list[str], names: list[str]) -> Iterator[FileDifference]:
    """What manifests say differently; ranks come last, there may be many."""
    ours, theirs = (dict(leaves(_told(each))) for each in (one, other))
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            yield FileDifference(_FILE, key, ours.get(key), theirs.get(key))
    for task in both:
        for name in names:
            ranks = one.rank(task, name), other.rank(task, name)
            if ranks[0] != ranks[1]:
                yield FileDifference(_FILE, f"ranks.{task}.{name}", *ranks)


def _told(bundle: BundleChanges) -> Mapping[str, Any]:
    manifest = bundle.manifest
    router = None if manifest.router is None else manifest.router.model_dump(mode="json")
    return {
        "kind": manifest.kind,
        "dtype": manifest.dtype,
        "base": " ".join(digest[:_SHORT] for digest in bundle.base_digests()),
        "tasks": {task: {"experts": _made_of(bundle, task), "head": _head(bundle, task)} for task in bundle.tasks},
        "heads": manifest.heads,
        "router": router,
    }


def _made_of(bundle: BundleChanges, task: str) -> str:
    return " ".join(digest[:_SHORT] for digest in sorted(bundle.tasks[task].files.values()))


def _head(bundle: BundleChanges, task: str) -> dict[str, Any] | None:
    told = bundle.settings_of_head(task)
    return None if told is None else json.loads(json.dumps(told))
