"""The right to write an output: its unfinished folder, its journal, and how it becomes the finished one.

    NAME.partial/          while work goes on
    NAME.partial.journal   locked by the run that owns the folder; the last thing to go
    NAME                   complete, by one rename, or not there

With `overwrite`, an earlier result stands until the new one is complete. Only folders that are empty or that this tool
made (they hold a `mergetool.json`) are ever replaced.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from mergetool.errors import OutputError, SourceError
from mergetool.outputs.journal import (
    Journal,
    adopt_old_journals,
    journal_path,
    old_journals,
    other_journals,
    read_done,
    remove_journals,
)
from mergetool.outputs.parts import check_parts, has_parts, keep_parts
from mergetool.planning import Plan
from mergetool.planning.inner import needed
from mergetool.planning.key import plan_key
from mergetool.tensors.io import write_error
from mergetool.tensors.writer import partial_path, sync_folder

LOCK_NAME = "mergetool.json"
_ELSEWHERE = "choose another place with -o PATH"


class Staging:
    """A claimed output. Raises OutputError when it may not be written, exists, or is being written."""

    def __init__(self, plan: Plan, output: Path, *, overwrite: bool, resume: bool, in_place: bool = False) -> None:
        """`in_place`: the output may be an input, which it then replaces."""
        self.output = output
        self.partial = partial_path(output)
        self.overwrite = overwrite
        self.key = plan_key(plan)
        self._inputs = [stamp for stamps in plan.stamps.values() for stamp in stamps]
        with _writing(self.partial):
            self._check_inputs(self.partial, *(() if in_place else (output,)))
            check_output(output, overwrite=overwrite)
            self._check_partial()
            check_parts(output)
            _make_parents(self.partial)
            adopt_old_journals(self.partial)
        self.journal = Journal(self.partial, self.key, resume=resume)
        try:
            with _writing(self.partial):
                check_output(output, overwrite=overwrite)  # it may have appeared before the journal was ours
                self.partial.mkdir(exist_ok=True)
                sync_folder(self.partial.parent)
                self.finished = resume and is_result(self.partial, self.key)
                self._take_over(plan)
                keep_parts(output, needed_parts(plan) if resume else ())
        except OutputError:
            self._let_be()
            raise

    def _take_over(self, plan: Plan) -> None:
        """What an earlier run of this plan left is gone on with, what another one left is removed."""
        if self.journal.was_there:
            self.journal.include(read_done(path, self.key) for path in other_journals(self.partial))
        if self.journal.resumed and not self._has_files(plan):
            self.journal.start_over()
        if not self.finished and not self.journal.was_there:
            _empty(self.partial)
            for path in other_journals(self.partial):
                path.unlink()

    def _let_be(self) -> None:
        """Leave a place as it was found, where nothing of an earlier run lies."""
        with suppress(OSError):
            if self.partial.is_dir():
                self.partial.rmdir()  # fails where there is anything in it
            remove_journals(self.partial)
        self.release()

    @classmethod
    def joined(cls, plan: Plan, output: Path, rank: int) -> "Staging":
        """What the leader of several processes has claimed, as one of the others sees it: with a journal of its own."""
        self = cls.__new__(cls)
        self.output, self.partial, self.overwrite, self.finished = output, partial_path(output), False, False
        self.key = plan_key(plan)
        self._inputs = [stamp for stamps in plan.stamps.values() for stamp in stamps]
        self.journal = Journal(self.partial, self.key, resume=True, rank=rank)
        return self

    def _check_inputs(self, *places: Path) -> None:
        inputs = [stamp.path for stamp in self._inputs]
        held = {folder for path in inputs for folder in (*path.absolute().parents, *path.resolve().parents)}
        for place in places:
            if place.resolve() in held or place.resolve() in {path.resolve() for path in inputs}:
                raise OutputError("the output is an input, or holds one", str(place), _ELSEWHERE)

    def _check_partial(self) -> None:
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise OutputError("is in the way and is not a folder", str(self.partial), "remove it")
        journal = journal_path(self.partial)
        if journal.is_symlink() or (journal.exists() and not journal.is_file()):
            raise OutputError("is in the way and is not a file", str(journal), "remove it")
        names = {path.name for path in self.partial.iterdir()} if self.partial.exists() else set()
        ours = journal.exists() or LOCK_NAME in names or old_journals(self.partial)
        if names and not ours:
            what = f"is in the way and was not made by mergetool (there is no {journal.name} beside it)"
            raise OutputError(what, str(self.partial), "remove it")

    def _has_files(self, plan: Plan) -> bool:
        """Whether the files that an earlier run was filling are still there."""
        try:
            return all((self.partial / shard.name).stat().st_size == shard.header.file_size for shard in plan.shards)
        except OSError:
            return False

    @property
    def has_work(self) -> bool:
        """Whether anything is merged, of this recipe or of one inside it."""
        return self.journal.worked or has_parts(self.output)

    def changed_inputs(self) -> list[Path]:
        """Input files that are no longer what they were when their headers were read."""
        return [stamp.path for stamp in self._inputs if stamp.changed()]

    def publish(self) -> None:
        """Make the partial folder the output, in one rename. The journal keeps others out until that is done."""
        if changed := self.changed_inputs():
            what = "the file changed while it was being merged"
            raise SourceError(what, str(changed[0]), "let nothing write to it, then run again")
        replaced = _replaced(self.output)
        with _writing(self.output):
            for path in old_journals(self.partial):
                path.unlink()
            sync_folder(self.partial)
            check_output(self.output, overwrite=self.overwrite)  # it may have appeared while this run worked
            if self.output.exists() and not _is_empty(self.output):
                _remove(replaced)
                self.output.rename(replaced)
            self.partial.rename(self.output)
            sync_folder(self.output.parent)
            keep_parts(self.output, ())
            remove_journals(self.partial)
            _remove(replaced)

    def discard(self) -> None:
        """Remove the unfinished folder, and let go of it."""
        with suppress(OSError):
            shutil.rmtree(self.partial)
            keep_parts(self.output, ())
            remove_journals(self.partial)

    def release(self) -> None:
        """Let go of the journal's lock."""
        self.journal.close()


def check_output(output: Path, *, overwrite: bool) -> None:
    """Whether an output may get this name: nothing is there, or an empty folder, or a result to `overwrite`.

    Raises OutputError.
    """
    if output.name in ("", ".."):
        raise OutputError("is no name for a new folder", str(output), _ELSEWHERE)
    with _writing(output):
        if not output.exists() and not output.is_symlink():
            return
        if not output.is_symlink() and _is_empty(output):
            _check_replaceable(output)
            return
    if not overwrite:
        raise OutputError("exists already", str(output), f"{_ELSEWHERE}, or add --overwrite")
    if not (output / LOCK_NAME).is_file():
        what = f"was not made by mergetool (it has no {LOCK_NAME}), so it will not be overwritten"
        raise OutputError(what, str(output), f"remove it yourself, or {_ELSEWHERE}")


def _check_replaceable(folder: Path) -> None:
    """An empty folder makes way for the finished one, unless something holds it where it is."""
    fix = f"write to a folder inside it: -o {quote(str(folder / 'merged'))}"
    if _is_mount(folder):
        what = "is where a disk is mounted, and a finished folder cannot take that name in one step"
        raise OutputError(what, str(folder), fix)
    if os.path.samestat(folder.stat(), Path().stat()):
        raise OutputError("is the current folder, which the finished one would replace", str(folder), fix)
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        what = f"is empty, but nothing may be written beside it (in {folder.parent})"
        raise OutputError(what, str(folder), fix)


def _is_mount(folder: Path) -> bool:
    """Also where the disk that is mounted there is the one around it (a bind mount), which only Linux tells."""
    if folder.is_mount():
        return True
    with suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
        places = {line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines}
        return os.fsencode(folder.resolve()) in places
    return False


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def is_result(folder: Path, key: str) -> bool:
    """Whether a folder holds all that a run of this plan writes, its lock last."""
    try:
        lock = json.loads((folder / LOCK_NAME).read_text("utf-8"))
        return bool(lock["plan"] == key and all((folder / name).is_file() for name in lock["output"]["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_made(plan: Plan) -> bool:
    """Whether the result of a recipe inside another one is there."""
    return plan.output is not None and is_result(plan.output, plan_key(plan))


def needed_parts(plan: Plan) -> set[str]:
    """Names of the results of recipes inside a plan that it still needs."""
    return {each.output.name for _, each in needed(plan, is_made) if each.output is not None}


def done_before(plan: Plan, output: Path, *, overwrite: bool) -> bool:
    """Whether the output is there, made by this very plan. What a killed run did not clear away then goes.

    A run that is killed after its result got its name could not say that it was done: the next one does. With
    `overwrite` only where its journal is still there; else the result is to be made again.
    """
    if not is_result(output, plan_key(plan)) or not _untouched(output):
        return False
    partial = partial_path(output)
    unsaid = journal_path(partial).is_file() and not partial.exists()
    if overwrite and not unsaid:
        return False
    with suppress(OSError, OutputError):  # what is left is in nobody's way, and may be another run's
        for path in old_journals(output):
            path.unlink()
        if unsaid:
            journal = Journal(partial, "", resume=True)
            _remove(_replaced(output))
            keep_parts(output, ())
            remove_journals(partial)
            journal.close()
    return True


def settle(output: Path) -> bool:
    """End a replacement that was killed between its renames, or after them. Returns whether there was one to end.

    Raises OutputError where it is still going on.
    """
    partial, replaced = partial_path(output), _replaced(output)
    renamed = output.exists() and not partial.exists() and (journal_path(partial).is_file() or replaced.exists())
    between = not output.exists() and (partial / LOCK_NAME).is_file() and (replaced / LOCK_NAME).is_file()
    if not (renamed or between):
        return False
    journal = Journal(partial, "", resume=True)
    with _writing(output):
        if between:
            partial.rename(output)
            sync_folder(output.parent)
        _remove(replaced)
        remove_journals(partial)
    journal.close()
    return True


def _untouched(result: Path) -> bool:
    """Whether no file of a result is younger than its lock, which was written last."""
    files = json.loads((result / LOCK_NAME).read_text("utf-8"))["output"]["files"]
    written = (result / LOCK_NAME).stat().st_mtime_ns
    return all((result / name).stat().st_mtime_ns <= written for name in files)


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Errors of the operating system, as ours."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBUSY:
            fix = f"write to a folder inside it: -o {quote(str(place / 'merged'))}"
            raise OutputError("is held where it is by the system", str(place), fix) from error
        raise write_error(error, str(place)) from error


def _replaced(output: Path) -> Path:
    return output.with_name(f"{output.name}.replaced")


def _empty(folder: Path, keep: str = "") -> None:
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
