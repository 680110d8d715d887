"""Every answer that a search got, line by line, so that a killed search goes on as if nothing had happened.

A search is a deterministic function of its answers: started again, it asks the same questions in the same order, and
the journal answers those that were answered before. No state of an optimiser is ever stored. A line is synced before
the search goes on; a torn last line is cut off. A lock on the file keeps a second search out.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetool.errors import OutputError
from mergetool.tensors.io import write_error

JOURNAL_NAME = "search.jsonl"


class SearchJournal:
    """The journal of one search, locked for as long as this object lives."""

    def __init__(self, folder: Path, header: Mapping[str, Any], *, resume: bool, leads: bool = True) -> None:
        """`leads`: whether this process writes it; others of the same search only read it once, at the start."""
        self.path = folder / JOURNAL_NAME
        self._header = dict(header)
        self._fd = -1
        self._answers: dict[str, dict[str, Any]] = {}
        self.num_replayed = 0
        if not leads:
            self._read()
            return
        self._open(folder)
        kept = self._read() if resume else []
        os.ftruncate(self._fd, sum(len(line) + 1 for line in kept))
        if not kept:
            self._write(self._header)

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

    def _read(self) -> list[bytes]:
        """The lines that can be used: all whole ones, if the header is that of this very search."""
        kept: list[bytes] = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not kept and record != json.loads(json.dumps(self._header)):
                return []
            kept.append(line)
            if "question" in record:
                self._answers[_key(record["question"])] = record
        return kept

    def answer(self, question: Any) -> dict[str, Any] | None:
        """The record that answers this question, from an earlier run or this one."""
        found = self._answers.get(_key(question))
        if found is not None:
            self.num_replayed += 1
        return found

    def record(self, question: Any, **answer: Any) -> dict[str, Any]:
        """Write an answer down, for good."""
        line = {"question": question, **answer}
        self._write(line)
        found: dict[str, Any] = json.loads(json.dumps(line))
        self._answers[_key(question)] = found
        return found

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

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _key(question: Any) -> str:
    return json.dumps(question, sort_keys=True)
