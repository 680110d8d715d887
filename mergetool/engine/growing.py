"""A bundle with other experts: a run whose models are experts of the bundle, as they are kept there, and new ones.

What the bundle keeps of an expert is cut where all of them share the space, never computed anew. The result's recipe,
and what its lock says of inputs, are those of a bundle that was made of all experts at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetool.bundle.manifest import AROUND, MASKED, Head, Manifest, Task, read_manifest
from mergetool.bundle.verify import base_folder, check_base, check_files
from mergetool.engine.progress import Progress, Silent
from mergetool.engine.run import Flags, run_recipe
from mergetool.errors import PlanError, RecipeError
from mergetool.outputs.push import read_lock
from mergetool.outputs.result import Result
from mergetool.outputs.staging import settle
from mergetool.recipe.load import load_recipe
from mergetool.recipe.schema import Past, Recipe
from mergetool.tensors.folder import is_adapter

_KEPT = ("architecture", "compute", "check")
"""Sections of the bundle's recipe that hold for its next one, beside `merge`."""


def change_bundle(
    bundle: Path,
    add: Mapping[str, Any],
    remove: Sequence[str] = (),
    flags: Flags | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """Write the bundle with experts added or removed, in its own place or to `flags.output`.

    `add`: models by name, as in a recipe; a folder of an adapter means it on the bundle's base. Returns None where an
    earlier run of the same had done it, but was killed before it said so. Raises any MergetoolError; the bundle is then
    as it was.
    """
    flags, progress = flags or Flags(), progress or Silent()
    output = flags.output or bundle
    settled = settle(output)
    manifest = read_manifest(bundle)
    if settled and _is_done(manifest, add, remove):
        return None
    _check_kind(bundle, manifest, add, remove)
    _check_names(bundle, manifest, add, remove)
    check_files(bundle, manifest, hashes=True)
    check_base(bundle, manifest, hashes=manifest.base.kind == "reference")
    asked = _recipe(bundle, manifest, add, remove)
    if (bundle / "calibration.json").is_file():
        progress.say("warning: its calibration was for other experts and is left out: calibrate again")
    try:
        return run_recipe(asked, replace(flags, output=output, push=False), progress)
    except PlanError as error:
        if "overrides:" in error.fix:
            lock = bundle / "mergetool.json"
            error.fix = f"add a fine-tune of the bundle's base; or, in the recipe of {lock}, {error.fix}"
        raise


def _check_kind(bundle: Path, manifest: Manifest, add: Mapping[str, Any], remove: Sequence[str]) -> None:
    """Raises PlanError for a bundle whose experts are kept as what they have to do with all others."""
    if manifest.kind not in (*MASKED, *AROUND):
        return
    kept = "masks of one change" if manifest.kind in MASKED else "what experts differ by from one merged model"
    what = f"{manifest.kind} keeps {kept} that all experts have a part in, and no expert by itself"
    done = f"add {', '.join(add)} to" if add else f"take {', '.join(remove)} out of"
    fix = f"{done} the models of the recipe that made it (see {bundle / 'mergetool.json'}), and run that again"
    raise PlanError(what, str(bundle), fix)


def _is_done(manifest: Manifest, add: Mapping[str, Any], remove: Sequence[str]) -> bool:
    return set(add) <= set(manifest.names) and not set(remove) & set(manifest.names)


def _check_names(bundle: Path, manifest: Manifest, add: Mapping[str, Any], remove: Sequence[str]) -> None:
    """Raises RecipeError for names that are taken or unknown, and for a bundle of nothing."""
    shown = f"its experts are {', '.join(manifest.names)}"
    if taken := [name for name in add if name in manifest.names and name not in remove]:
        fix = f"choose another name, or first: mergetool bundle remove {bundle} {taken[0]}"
        raise RecipeError(f"there is an expert {taken[0]!r} already ({shown})", str(bundle), fix)
    if unknown := [name for name in remove if name not in manifest.names]:
        raise RecipeError(f"there is no expert {unknown[0]!r}", str(bundle), shown)
    if not add and set(remove) >= set(manifest.names):
        raise RecipeError("no expert would be left", str(bundle), f"keep one ({shown}), or delete the folder")


def _recipe(bundle: Path, manifest: Manifest, add: Mapping[str, Any], remove: Sequence[str]) -> Recipe:
    lock = read_lock(bundle)
    told: Mapping[str, Any] = lock["recipe"]
    base, place = str(base_folder(bundle, manifest).absolute()), str(bundle.absolute())
    kept = [task for task in manifest.tasks if task.name not in remove]
    new = {name: _reference(source, base) for name, source in add.items()}
    sections = {key: told[key] for key in ("merge", *_KEPT) if key in told}
    asked = load_recipe(
        {"base": base, "models": {task.name: _expert(place, task) for task in kept} | new, **sections}, folder=Path()
    )
    stayed = ("base", *(task.name for task in kept))
    inputs, origins = (
        {name: lock[key][name] for name in stayed if name in lock.get(key, {})} for key in ("inputs", "origins")
    )
    digests = {f"{place}/{name}": digest for name, digest in manifest.files.items()}  # compared a moment ago
    past = Past(bundle.absolute(), {task.name: task for task in kept}, inputs, origins, digests)
    models = {task.name: told["models"][task.name] for task in kept if task.name in told.get("models", {})}
    return replace(asked, past=past, document={**told, "models": models | dict(add)}, name=place)


def _expert(bundle: str, task: Task) -> dict[str, Any]:
    """What a recipe calls an expert of a bundle. A head of transformers comes with it."""
    reference = {"source": bundle, "select": task.name}
    if not isinstance(task.head, Head):
        return reference
    head = task.head
    given = {"weights": f"{bundle}/{head.file}", "pool": head.pool, "normalize": head.normalize}
    return {**reference, "head": {**given, "labels": list(head.labels)}}


def _reference(model: Any, base: str) -> Any:
    """A model as it is called, or an adapter on the bundle's base."""
    adapter = model if isinstance(model, str) and is_adapter(Path(model)) else None
    adapter = model.get("adapter") if isinstance(model, Mapping) else adapter
    return model if adapter is None else {"source": base, "adapters": [adapter]}


def dense_recipe(bundle: Path, task: str) -> Recipe:
    """The recipe that makes a checkpoint of one expert, with its head and labels. Raises PlanError for a bare head."""
    manifest = read_manifest(bundle)
    head = {each.name: each.head for each in manifest.tasks}.get(task)
    if isinstance(head, Head):
        what = f"the head of {task!r} is a matrix beside the model, of no class of transformers"
        fix = f"use it by mergetool route {bundle} --task {task}, or the base part of the expert by select: in a recipe"
        raise PlanError(what, str(bundle), fix)
    models = {task: {"source": str(bundle.absolute()), "select": task}}
    return load_recipe({"models": models, "merge": {"method": "passthrough"}}, folder=Path())
