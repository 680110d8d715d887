"""Push a result: what its lock names, and the lock. Nothing else that lies in the folder goes.

The lock's SHA-256 is believed for a file that is older than the lock; a younger one is hashed again, and must agree.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mergetool._version import __version__
from mergetool.bundle import is_bundle
from mergetool.errors import HubError, SourceError
from mergetool.methods.base import expect
from mergetool.methods.families.bundle import BundleMethod
from mergetool.outputs.staging import LOCK_NAME
from mergetool.recipe.schema import Recipe
from mergetool.tensors.hub_upload import Pushed, Target, check_target, push_folder
from mergetool.tensors.io import sha256_file
from mergetool.tensors.source import FileStamp


def push(folder: Path, target: Target) -> Pushed:
    """Upload a finished result. Raises SourceError for a folder that is not one, HubError."""
    from mergetool.bundle.manifest import read_manifest

    lock = read_lock(folder)
    if is_bundle(folder) and read_manifest(folder).base.kind == "reference":
        raise _refers_to_its_base(str(folder))
    digests = {name: _digest(folder, name, digest) for name, digest in lock["output"]["files"].items()}
    digests[LOCK_NAME] = sha256_file(folder / LOCK_NAME)
    method = str(lock["recipe"].get("merge", {}).get("method", "merge"))
    content = hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
    title = f"Merge by {method}: {content[:12]} (mergetool {__version__})"
    return push_folder(folder, digests, LOCK_NAME, title, target)


def push_target(recipe: Recipe, wanted: bool | None) -> Target | None:
    """Where a run will push to, if it does; that it can is checked now. Raises HubError."""
    hub = recipe.output.hub
    if wanted and hub is None:
        raise HubError("nowhere to push to", recipe.name, "add output: {hub: {repo: ORG/NAME}}")
    if hub is None or wanted is False:
        return None
    if recipe.method.result == "bundle" and expect(recipe.method, BundleMethod).base == "reference":
        raise _refers_to_its_base(recipe.name)
    target = Target(**hub.model_dump())
    check_target(target)
    return target


def _refers_to_its_base(where: str) -> HubError:
    what = "the bundle refers to its base by a path on this machine, which means nothing elsewhere"
    return HubError(what, where, "merge with base: copy")


def push_result(folder: Path, target: Target) -> Pushed:
    """Push at the end of a run, whose result stays where it is whatever happens."""
    try:
        return push(folder, target)
    except HubError as error:
        error.fix += f"; the merge is finished, push it with: mergetool push {folder} {target.repo}"
        raise


def read_lock(folder: Path) -> dict[str, Any]:
    """The lock of a result, checked as far as others rely on it. Raises SourceError."""
    path = folder / LOCK_NAME
    try:
        lock: dict[str, Any] = json.loads(path.read_text("utf-8"))
        files = lock["output"]["files"]
        sound = isinstance(lock["recipe"], dict) and isinstance(lock["inputs"], dict)
        names = [str(name) for name, digest in files.items() if len(bytes.fromhex(digest)) == 32]
    except OSError:
        what = f"has no {LOCK_NAME}, so it is no result of mergetool"
        raise SourceError(what, str(folder), "name the folder that a run has written") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError("the lock cannot be read", str(path), "merge again") from None
    if not sound or len(names) != len(files) or any(Path(n).is_absolute() or ".." in Path(n).parts for n in names):
        raise SourceError("the lock cannot be read", str(path), "merge again")
    return lock


def _digest(folder: Path, name: str, digest: str) -> str:
    stamp, lock = FileStamp.of(folder / name), FileStamp.of(folder / LOCK_NAME)
    if stamp.mtime_ns > lock.mtime_ns and sha256_file(stamp.path) != digest:
        fix = "merge again, or put the file back"
        raise SourceError("the file is not what the lock says: it was changed afterwards", str(stamp.path), fix)
    return digest
