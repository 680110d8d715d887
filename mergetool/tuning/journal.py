"""Every answer that a search got, line by line, so that nothing is ever asked twice: killed, edited, or extended.

A search is a deterministic function of its answers: started again, it asks the same questions in the same order, and
what was answered before is not asked again. No state of an optimiser is ever stored, so a search with more generations
is the old one, replayed, and then some. A header stands above the answers of each recipe: what it asked, and which
items its numbers mean. Lines are only ever added, and synced before the search goes on; a torn last line is cut off. A
lock on the file keeps a second search out.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetool.errors import OutputError
from mergetool.tensors.io import write_error
from mergetool.tuning.kept import Kept

JOURNAL_NAME = "search.jsonl"


class SearchJournal:
    """The journal of one search, locked for as long as this object lives."""

    def __init__(self, folder: Path, header: Mapping[str, Any], *, resume: bool, leads: bool = True) -> None:
        """`leads`: whether this process writes it; others of the same search only read it once, at the start."""
        self.path = folder / JOURNAL_NAME
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        self._fd = -1
        if leads:
            self._open(folder)
        self.kept = Kept(self._header)
        """What is known from before."""
        self.last: Mapping[str, Any] | None = None
        """The header of the search that was here before; None if there was none."""
        whole = self._read()
        self.dropped = 0 if resume else self.kept.num_answers
        """Answers that were thrown away because that was asked for."""
        if not resume:
            self.kept, self.last, whole = Kept(self._header), None, 0
        if leads:
            os.ftruncate(self._fd, whole)
            if self.last != self._header:
                self._write(self._header)

    @property
    def continues(self) -> bool:
        """Whether the search that was here before is this very one."""
        return self.last == self._header

    def record(self, question: Any, of: str, **answer: Any) -> dict[str, Any]:
        """Write an answer down, for good. `of` is the identity of who was asked."""
        line = {"question": question, "of": of, **answer}
        self._write(line)
        entry: dict[str, Any] = json.loads(json.dumps(line))
        return entry

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, str(self.path)) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            fix = "wait for it, or choose another place with -o PATH"
            raise OutputError("another search is writing here", str(folder), fix) from None

    def _read(self) -> int:
        """Take in what is there. Returns the bytes of whole lines."""
        content = self.path.read_bytes()
        for line in content.split(b"\n")[:-1]:
            try:
                record = json.loads(line)
                if "question" not in record:
                    self.last = record
                elif self.last is not None:
                    self.kept.take(record, self.last)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                continue  # a damaged line is no answer; those after it are
        return content.rfind(b"\n") + 1

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._fd < 0:
            return
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError("the line was not written whole")
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(error, str(self.path)) from error
