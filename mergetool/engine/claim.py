"""The right to write an output: its unfinished folder, its journal, and how it becomes the finished one.

    NAME.partial/          while work goes on; its journal is locked by the run that owns it
    NAME                   complete, by one rename, or not there

With `overwrite`, an earlier result stands until the new one is complete. Only folders that this tool made (they hold
a `mergetool.json`) are ever replaced.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergetool._version import __version__
from mergetool.engine.journal import JOURNAL_NAME, Journal, other_journal, other_journals, read_done
from mergetool.errors import OutputError, SourceError
from mergetool.planner import Plan
from mergetool.planner.model import UNIT_ELEMENTS
from mergetool.tensors.io import write_error
from mergetool.tensors.writer import partial_path, sync_folder

LOCK_NAME = "mergetool.json"
_ELSEWHERE = "choose another place with -o PATH"


class Claim:
    """A claimed output. Raises OutputError when it may not be written, exists, or is being written."""

    def __init__(self, plan: Plan, output: Path, *, overwrite: bool, resume: bool) -> None:
        self.output = output
        self.partial = partial_path(output)
        self.overwrite = overwrite
        self.key = plan_key(plan)
        self._inputs = [stamp for stamps in plan.stamps.values() for stamp in stamps]
        try:
            self._check_inputs()
            self._check_output()
            self._check_partial()
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, str(self.partial)) from error
        self.finished = resume and self._is_finished()
        self.journal = Journal(self.partial, self.key, resume=resume)
        try:
            if self.journal.found:
                self.journal.include(read_done(path, self.key) for path in other_journals(self.partial))
            if self.journal.resumed and not self._has_files(plan):
                self.journal.start_over()
            if not self.finished and not self.journal.found:
                _empty(self.partial, keep=JOURNAL_NAME)
        except OSError as error:
            self.release()
            raise write_error(error, str(self.partial)) from error

    @classmethod
    def joined(cls, plan: Plan, output: Path, rank: int) -> "Claim":
        """What the leader of several processes has claimed, as one of the others sees it: with a journal of its own."""
        self = cls.__new__(cls)
        self.output, self.partial, self.overwrite, self.finished = output, partial_path(output), False, False
        self.key = plan_key(plan)
        self._inputs = [stamp for stamps in plan.stamps.values() for stamp in stamps]
        self.journal = Journal(self.partial, self.key, resume=True, name=other_journal(rank))
        return self

    def _check_inputs(self) -> None:
        inputs = [stamp.path for stamp in self._inputs]
        held = {folder for path in inputs for folder in (*path.absolute().parents, *path.resolve().parents)}
        for place in (self.output, self.partial):
            if place.resolve() in held or place.resolve() in {path.resolve() for path in inputs}:
                raise OutputError("the output is an input, or holds one", str(place), _ELSEWHERE)

    def _check_output(self) -> None:
        if self.output.name in ("", ".."):
            raise OutputError("is no name for a new folder", str(self.output), _ELSEWHERE)
        if self.output.exists() or self.output.is_symlink():
            if not self.overwrite:
                raise OutputError("exists already", str(self.output), f"{_ELSEWHERE}, or add --overwrite")
            if not (self.output / LOCK_NAME).is_file():
                what = "was not made by mergetool (it has no mergetool.json), so it will not be overwritten"
                raise OutputError(what, str(self.output), f"remove it yourself, or {_ELSEWHERE}")

    def _check_partial(self) -> None:
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise OutputError("is in the way and is not a folder", str(self.partial), "remove it")
        found = {path.name for path in self.partial.iterdir()} if self.partial.exists() else set()
        if found and not found & {JOURNAL_NAME, LOCK_NAME}:
            raise OutputError("is in the way and was not made by mergetool", str(self.partial), "remove it")

    def _is_finished(self) -> bool:
        """Everything was written and synced, only the rename is missing."""
        try:
            lock = json.loads((self.partial / LOCK_NAME).read_text("utf-8"))
            return lock["plan"] == self.key and all((self.partial / name).is_file() for name in lock["output"]["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _has_files(self, plan: Plan) -> bool:
        """Whether the files that an earlier run was filling are still there."""
        try:
            return all((self.partial / shard.name).stat().st_size == shard.header.file_size for shard in plan.shards)
        except OSError:
            return False

    def changed_inputs(self) -> list[Path]:
        """Input files that are no longer what they were when their headers were read."""
        return [stamp.path for stamp in self._inputs if stamp.changed()]

    def publish(self) -> None:
        """Make the partial folder the output, in one rename. The journal keeps others out until that is done."""
        if changed := self.changed_inputs():
            what = "the file changed while it was being merged"
            raise SourceError(what, str(changed[0]), "let nothing write to it, then run again")
        replaced = self.output.with_name(f"{self.output.name}.replaced")
        try:
            sync_folder(self.partial)
            self._check_output()  # it may have appeared while this run worked
            if self.output.exists():
                _remove(replaced)
                self.output.rename(replaced)
            self.partial.rename(self.output)
            sync_folder(self.output.parent)
            for path in (*other_journals(self.output), self.output / JOURNAL_NAME):
                path.unlink()
            _remove(replaced)
        except OSError as error:
            raise write_error(error, str(self.output)) from error

    def discard(self) -> None:
        """Remove the unfinished folder."""
        with suppress(OSError):
            _empty(self.partial, keep=JOURNAL_NAME)
            shutil.rmtree(self.partial)

    def release(self) -> None:
        """Let go of the journal's lock."""
        self.journal.close()


def _empty(folder: Path, *, keep: str) -> None:
    """Remove everything in a folder but the file that tells whose it is."""
    for path in folder.iterdir():
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(replaced: Path) -> None:
    """Remove an earlier result of this tool, wherever a killed run may have left off removing it."""
    if replaced.is_symlink():
        replaced.unlink()
    elif (replaced / LOCK_NAME).is_file():
        _empty(replaced, keep=LOCK_NAME)
        shutil.rmtree(replaced)


def plan_key(plan: Plan) -> str:
    """SHA-256 of all that decides the bytes of the output: recipe, inputs as they lie on the disk, layout, versions."""
    document = asked_for(plan.recipe.document)
    inputs = [
        [name, str(stamp.path.resolve()), stamp.size, stamp.mtime_ns]
        for name, stamps in plan.stamps.items()
        for stamp in stamps
    ]
    layout = [[shard.name, hashlib.sha256(shard.prefix).hexdigest()] for shard in plan.shards]
    versions = [__version__, version("torch")]
    text = json.dumps([versions, UNIT_ELEMENTS, document, inputs, layout], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def asked_for(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data without where its result goes."""
    output = {key: value for key, value in dict(document.get("output") or {}).items() if key not in ("path", "hub")}
    return {**document, "output": output}
