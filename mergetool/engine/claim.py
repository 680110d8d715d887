"""The right to write an output: its unfinished folder, its journal, and how it becomes the finished one.

    NAME.partial/          while work goes on; its journal is locked by the run that owns it
    NAME                   complete, by one rename, or not there

With `overwrite`, an earlier result stands until the new one is complete. Only folders that this tool made (they hold
a `mergetool.json`) are ever replaced.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from mergetool import __version__
from mergetool.engine.journal import Journal
from mergetool.errors import OutputError
from mergetool.planner import Plan
from mergetool.planner.model import UNIT_ELEMENTS
from mergetool.tensors.io import write_error
from mergetool.tensors.writer import partial_path, sync_folder

LOCK_NAME = "mergetool.json"


class Claim:
    """A claimed output. Raises OutputError when it may not be written, exists, or is being written."""

    def __init__(self, plan: Plan, output: Path, *, overwrite: bool, resume: bool) -> None:
        self.output = output
        self.partial = partial_path(output)
        self.overwrite = overwrite
        self.key = plan_key(plan)
        self._check(plan)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, str(self.partial)) from error
        self.finished = resume and self._is_finished()
        self.journal = Journal(self.partial, self.key, resume=resume)
        if not self.finished and not self.journal.found:
            self._clear()

    def _check(self, plan: Plan) -> None:
        elsewhere = "choose another place with -o PATH"
        inputs = [stamp.path for source in plan.sources.values() for stamp in source.files]
        held = {folder for path in inputs for folder in (*path.absolute().parents, *path.resolve().parents)}
        for place in (self.output, self.partial):
            if place.resolve() in held or place.resolve() in {path.resolve() for path in inputs}:
                raise OutputError("the output is an input, or holds one", str(place), elsewhere)
        if self.output.exists() or self.output.is_symlink():
            if not self.overwrite:
                raise OutputError("exists already", str(self.output), f"{elsewhere}, or add --overwrite")
            if not (self.output / LOCK_NAME).is_file():
                what = "was not made by mergetool (it has no mergetool.json), so it will not be overwritten"
                raise OutputError(what, str(self.output), f"remove it yourself, or {elsewhere}")
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError("is in the way and is not a folder", str(self.partial), "remove it")

    def _is_finished(self) -> bool:
        """Everything was written and synced, only the rename is missing."""
        try:
            lock = json.loads((self.partial / LOCK_NAME).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(lock, dict) and lock.get("plan") == self.key

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path == self.journal.path:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def publish(self) -> None:
        """Make the partial folder the output, in one rename."""
        try:
            self.journal.remove()
            sync_folder(self.partial)
            replaced = None
            if self.output.exists():
                replaced = self.output.with_name(f"{self.output.name}.replaced-{os.getpid()}")
                self.output.rename(replaced)
            self.partial.rename(self.output)
            sync_folder(self.output.parent)
            if replaced is not None:
                shutil.rmtree(replaced)
        except OSError as error:
            raise write_error(error, str(self.output)) from error

    def discard(self) -> None:
        """Remove the unfinished folder."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def release(self) -> None:
        """Let go of the journal's lock."""
        self.journal.close()


def plan_key(plan: Plan) -> str:
    """SHA-256 of all that decides the bytes of the output: recipe, inputs as they lie on the disk, layout, version."""
    document = {**plan.recipe.document}
    document["output"] = {key: value for key, value in dict(document.get("output") or {}).items() if key != "path"}
    inputs = [
        [name, str(stamp.path.resolve()), stamp.size, stamp.mtime_ns]
        for name, source in plan.sources.items()
        for stamp in source.files
    ]
    layout = [[shard.name, hashlib.sha256(shard.prefix).hexdigest()] for shard in plan.shards]
    text = json.dumps([__version__, UNIT_ELEMENTS, document, inputs, layout], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
