"""Two bundles, compared by what their experts add: the same change has many pairs of factors."""

from collections.abc import Iterator

import torch

from mergetool.bundle.changes import BundleChanges, slices
from mergetool.bundle.verify import base_folder
from mergetool.engine.comparing import NOISE_OF_MATRICES, Compared
from mergetool.engine.opposites import Matched
from mergetool.kernels.last_place import SEVERAL, distance
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.folder import open_model


def compare_bundles(made: BundleChanges, found: BundleChanges) -> tuple[Matched, dict[str, Compared]]:
    """What the recipe has made, and what is there. Raises SourceError for a bundle whose base is gone."""
    pairs = Matched(open_model(base_folder(found.folder, found.manifest)))
    pairs.source.close()
    pairs.problems += _problems(made, found)
    compared = {}
    for task in made.tasks if not pairs.problems else ():
        for name in made.manifest.parameters:
            compared[f"{task}: {name}"] = _compared(task, name, made, found)
    return pairs, compared


def _problems(made: BundleChanges, found: BundleChanges) -> Iterator[str]:
    """What makes it another bundle, before a factor is read."""
    ours, theirs = made.manifest, found.manifest
    if ours.names != theirs.names:
        yield f"its tasks are {', '.join(theirs.names)}, by the recipe {', '.join(ours.names)}"
        return
    if made.base_digests() != found.base_digests():
        yield "it was made for another base"
    shapes = [{name: each.shape for name, each in bundle.parameters.items()} for bundle in (ours, theirs)]
    if shapes[0] != shapes[1]:
        yield f"it has {len(shapes[1])} tensors of the base, by the recipe {len(shapes[0])}, or in other shapes"
    for key in ("kind", "dtype", "heads", "router"):
        one, other = getattr(ours, key), getattr(theirs, key)
        if one != other:
            yield f"its {key} is not that of the recipe: {_in_words(other)} here, {_in_words(one)} by the recipe"
    for task in made.tasks:
        if made.settings_of_head(task) != found.settings_of_head(task):
            yield f"the head of {task!r} is another one"


def _in_words(value: object) -> str:
    return value if isinstance(value, str) else "none" if value is None else str(value).replace("'", "")


def _compared(task: str, name: str, made: BundleChanges, found: BundleChanges) -> Compared:
    shape = made.manifest.parameters[name].shape
    wanted = torch_dtype(made.dtype)
    noise = max(NOISE_OF_MATRICES, SEVERAL * torch.finfo(wanted).eps)  # factors are rounded, products add that up
    result = Compared(f"{task}: {name}", torch.Size(shape).numel())
    ours, theirs = made.change(task, name), found.change(task, name)
    for start, stop in slices(shape):
        expected, values = ours.read(start, stop), theirs.read(start, stop)
        told = distance(expected, values, wanted, noise)
        if told.other:
            result.add(told, start, expected, values, ())
    return result
