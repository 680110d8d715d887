"""What has been done, line by line, so that a killed run goes on where it was.

One JSON line for every finished unit, written after its bytes were handed to the kernel; these survive a kill of the
process. They do not all survive a power cut, so from time to time the data is synced and a `synced` line follows.
The header line holds the machine's boot id: resuming within the same boot trusts every line, after a reboot only as
many as the last `synced` line vouches for (which the new boot then notes). A torn last line is cut off. An exclusive
lock on the file keeps a second run out.

It lies beside the unfinished folder, `NAME.partial.journal`: so that folder can be given its name at any moment, and
whoever has the lock knows that nobody else is about to.
"""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

from mergetool.errors import OutputError
from mergetool.methods.base import Stats
from mergetool.methods.group import Note
from mergetool.planning import Step
from mergetool.tensors.io import write_error

_OLD_NAMES = ("journal.jsonl", ".journal.*.jsonl")
"""Inside the folder, where they were once."""
_GRACE = 2.0
"""Seconds in which processes of a run that was just killed notice it and let its lock go."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Done:
    """What earlier runs finished: units by (stage, step, start), statistics by (stage, first step), and so on."""

    units: set[tuple[str, int, int]] = field(default_factory=set)
    stats: dict[tuple[str, int], Stats] = field(default_factory=dict)
    notes: dict[str, list[Note]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, other: "Done") -> None:
        """What another process finished, too."""
        self.units |= other.units
        self.stats |= other.stats
        self.hashes |= other.hashes
        for name, notes in other.notes.items():
            known = self.notes.setdefault(name, [])
            known += [note for note in notes if note not in known]
        self.seconds = max(self.seconds, other.seconds)


class Journal:
    """The journal of one unfinished folder, locked for as long as this object lives."""

    def __init__(self, partial: Path, key: str, *, resume: bool, rank: int = 0) -> None:
        self.path = journal_path(partial, rank)
        self._fd = _open_locked(self.path)
        self._lock = threading.Lock()
        self._key = key
        lines, boot = _trusted(self.path, key) if resume else ([], "")
        self.done = Done()
        for line in lines[1:]:
            _apply(self.done, json.loads(line))
        self.was_there = bool(lines)
        """Whether there was a journal of this very plan."""
        self.resumed = bool(self.done.units)
        self.worked = self.resumed
        """Whether anything is merged."""
        self._num_records = len(lines)
        os.ftruncate(self._fd, sum(len(line) + 1 for line in lines))
        if not lines:
            self._begin()
        elif boot != _boot_id():
            self.synced(len(lines), self.done.seconds)

    def _begin(self) -> None:
        self._write({"key": self._key, "boot": _boot_id()})
        os.fsync(self._fd)

    def include(self, others: Iterable[Done]) -> None:
        """Take over what other processes of this or of an earlier run finished."""
        for done in others:
            self.done.add(done)
        self.resumed = bool(self.done.units)

    def start_over(self) -> None:
        """Forget everything: what this journal speaks of is not there."""
        os.ftruncate(self._fd, 0)
        self.done = Done()
        self.was_there = self.resumed = self.worked = False
        self._num_records = 0
        self._begin()

    def fileno(self) -> int:
        """The file descriptor that holds the lock."""
        return self._fd

    def unit(self, stage: str, step: Step, start: int, notes: list[Note]) -> None:
        """A unit's bytes are in the page cache."""
        self.worked = True
        self._write({"unit": [stage, step.index, start]} | ({"name": step.name, "notes": notes} if notes else {}))

    def known(self, stage: str, steps: Sequence[Step]) -> Stats | None:
        """What an earlier run counted over these steps."""
        return self.done.stats.get((stage, steps[0].index))

    def counted(self, stage: str, steps: Sequence[Step], stats: Stats) -> None:
        """All passes over these steps are finished."""
        lists = {key: list(values) for key, values in stats.items()}
        self._write({"counted": [stage, steps[0].index], "stats": lists})

    def hashed(self, path: str, digest: str) -> None:
        """An input file's SHA-256 is known."""
        self._write({"input": path, "sha256": digest})

    def mark(self) -> int:
        """How many records there are now: what to hand to `synced` after syncing the data."""
        return self._num_records

    def synced(self, mark: int, seconds: float) -> None:
        """The data of the first `mark` records is on the disk; `seconds` of work so far, over all runs."""
        self._write({"synced": mark, "seconds": round(seconds, 3), "boot": _boot_id()})
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            with self._lock:
                if os.write(self._fd, line) != len(line):  # nothing is lost: a torn line is ignored, and this run ends
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._num_records += 1
        except OSError as error:
            raise write_error(error, str(self.path)) from error


def journal_path(partial: Path, rank: int = 0) -> Path:
    """Where the journal of an unfinished folder lies; each process has its own."""
    return partial.with_name(f"{partial.name}.journal" + (f".{rank}" if rank else ""))


def other_journals(partial: Path) -> list[Path]:
    """The journals of processes that did not lead, of whatever run."""
    return sorted(partial.parent.glob(f"{escape(partial.name)}.journal.*"))


def remove_journals(partial: Path) -> None:
    """Remove all journals of a folder, last the one whose lock keeps others out."""
    for path in (*other_journals(partial), journal_path(partial)):
        path.unlink(missing_ok=True)


def old_journals(folder: Path) -> list[Path]:
    """Journals inside a folder, where an earlier version kept them."""
    return [path for name in _OLD_NAMES for path in sorted(folder.glob(name))]


def adopt_old_journals(partial: Path) -> None:
    """Move journals that an earlier version left in an unfinished folder to where they belong now.

    Raises OutputError where that version is still at work.
    """
    for path in old_journals(partial):
        os.close(_open_locked(path))
        rank = path.name.removeprefix(".journal.").removesuffix(".jsonl") if path.name.startswith(".") else "0"
        with suppress(FileNotFoundError):  # another run did so just now
            path.rename(journal_path(partial, int(rank) if rank.isdigit() else 0))


def read_done(path: Path, key: str) -> Done:
    """What a journal that nobody writes any more says of this plan."""
    done = Done()
    for line in _trusted(path, key)[0][1:]:
        _apply(done, json.loads(line))
    return done


def _open_locked(path: Path) -> int:
    busy = OutputError(
        "another run is writing this output", str(path), "wait for it, or choose another place with -o PATH"
    )
    patient_until = time.monotonic() + _GRACE
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, str(path)) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() > patient_until:
                raise busy from None
            time.sleep(0.02)
            continue
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            raise write_error(error, str(path)) from error
        os.close(fd)  # the run that held it has just finished and removed it: what it left is to be looked at


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _trusted(path: Path, key: str) -> tuple[list[bytes], str]:
    """The lines that can be believed (see above; none of another plan), and the boot that wrote the last of them."""
    lines: list[bytes] = []
    synced, boot = 1, ""
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or (not lines and record.get("key") != key):
            break
        lines.append(line)
        synced, boot = record.get("synced", synced), record.get("boot", boot)
    same_boot = bool(boot) and boot == _boot_id()
    return (lines if same_boot else lines[:synced]), boot


def _apply(done: Done, record: dict[str, Any]) -> None:
    if "synced" in record:
        done.seconds = record["seconds"]
    elif "unit" in record:
        stage, step, start = record["unit"]
        done.units.add((stage, step, start))
        notes = done.notes.setdefault(record.get("name", ""), [])
        told = [note if isinstance(note, str) else (note[0], note[1]) for note in record.get("notes", ())]
        notes += [note for note in told if note not in notes]
    elif "counted" in record:
        stage, step = record["counted"]
        done.stats[stage, step] = {key: tuple(values) for key, values in record["stats"].items()}
    elif "input" in record:
        done.hashes[record["input"]] = record["sha256"]
