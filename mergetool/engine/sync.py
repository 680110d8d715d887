"""What happens again and again while others compute: data is synced, and processes tell one another what they wrote."""

import threading
import time
from contextlib import AbstractContextManager

from mergetool.engine.context import Merging
from mergetool.engine.processes import Team
from mergetool.engine.schedule import Schedule
from mergetool.outputs.journal import Journal
from mergetool.tensors.writer import SlotWriter

_SYNC_SECONDS = 0.5
_TALK_SECONDS = 0.1


class SyncLoop(AbstractContextManager[None]):
    """Keeps the disk busy while others compute, and bounds what a power cut can undo."""

    def __init__(self, merging: Merging, schedule: Schedule, writer: SlotWriter, journal: Journal, team: Team) -> None:
        self._merging = merging
        self._schedule = schedule
        self._writer = writer
        self._journal = journal
        self._team = team
        self._before = journal.done.seconds
        self._started = self._synced = time.monotonic()
        self._marker = 0
        self._told = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """The last beat, unless something failed: what was written here, the others must know."""
        self._ended.set()
        self._thread.join()
        if self._schedule.error is None and self._team.size > 1:
            self._tell(sync=not self._team.one_machine)

    def _beat(self) -> None:
        alone = self._team.size == 1
        while not self._ended.wait(_SYNC_SECONDS if alone else _TALK_SECONDS):
            try:
                due = time.monotonic() - self._synced >= _SYNC_SECONDS
                if alone:
                    self._sync()
                    continue
                if due or self._team.one_machine:
                    self._tell(sync=due)
                news = self._team.poll()
                self._schedule.record(lambda heard=news: self._merging.others_merged(heard))  # type: ignore[misc]
            except BaseException as error:
                self._schedule.stop(error)
                return

    def _tell(self, *, sync: bool) -> None:
        """Publish the units of this process; those on other machines may only hear of what is on the disk."""
        written = len(self._merging.finished)
        if sync:
            self._sync()
        self._team.publish(self._merging.finished[self._told : written])
        self._told = written

    def _sync(self) -> None:
        if self._journal.mark() == self._marker:
            return
        marker = self._journal.mark()
        self._writer.sync()
        self._synced = time.monotonic()
        self._journal.synced(marker, self._before + self._synced - self._started)
        self._marker = self._journal.mark()
