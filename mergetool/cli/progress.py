"""How far a run is: a live bar on a terminal; elsewhere a line at once, and then one every half minute."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mergetool.cli.show import console, is_terminal, manner, plain, say
from mergetool.units import filesize, timespan

if TYPE_CHECKING:
    from rich.progress import Progress

_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class ProgressBar:
    """Tells the stage, what is done of it, how fast, and the time that is left. Used by several threads."""

    def __init__(self, *, quiet: bool = False, every: float = _EVERY, stream: TextIO | None = None) -> None:
        self._quiet, self._every = quiet, every
        self._stream = stream
        self._live: Progress | None = None
        self._ended = threading.Event()
        self._first: tuple[float, int] | None = None
        """When the first of this stage was done, and how much that was."""
        self._begin(0, "starting", "B")

    def __enter__(self) -> "ProgressBar":
        if self._quiet:
            return self
        if is_terminal(self._stream or sys.stderr):
            self._draw()
        else:
            threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, total: int, label: str, unit: str = "B") -> None:
        """Begin a stage in which `total` bytes (or items, as `unit` says) are to be done; 0: nobody knows how many."""
        self._begin(total, label, unit)
        if self._live is not None:
            self._live.reset(self._live.task_ids[0], total=total or None, description=plain(label))
        elif total:
            self._line()

    def advance(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        if self._first is None:  # what a resumed run begins with tells nothing of its speed
            self._first = (time.monotonic(), self._done)
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=self._done)

    def say(self, text: str) -> None:
        """A message that stays, above the bar."""
        say(text, None if self._live is None else self._live.console, self._stream)

    def stop(self) -> None:
        """The stage is over."""
        self.start(0, "finishing")

    def __str__(self) -> str:
        """What is done, how fast, and how much longer it takes, as far as is known."""
        if not self._total:
            return f"{timespan(time.monotonic() - self._began)} so far"
        share = min(1.0, self._done / self._total)
        told = f"{share:.0%} of {self._amount(self._total)}"
        rate = self._rate()
        if not rate:
            return told
        return f"{told}, {self._amount(rate)}/s, {timespan((self._total - self._done) / rate)} left"

    def _begin(self, total: int, label: str, unit: str) -> None:
        self._total, self._label, self._unit, self._done = total, label, unit, 0
        self._began, self._first = time.monotonic(), None

    def _rate(self) -> float:
        """Bytes or items a second since the first of them; 0 while that is not known."""
        if self._first is None or self._done == self._first[1]:
            return 0.0
        return (self._done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-3)

    def _amount(self, count: float) -> str:
        return filesize(count) if self._unit == "B" else f"{count:,.{0 if count >= 10 else 1}f} {self._unit}"

    def _draw(self) -> None:
        """The bar itself; rich draws it from a thread of its own."""
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        bar = self

        class Amount(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(str(bar))

        amount = Amount(table_column=Column(no_wrap=True))
        columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), BarColumn(20), amount)
        self._live = Progress(
            *columns, console=console(self._stream), transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.add_task(self._label, total=None)
        self._live.start()

    def _tell(self) -> None:
        """A line every now and then, until the end."""
        while not self._ended.wait(self._every):
            self._line()

    def _line(self) -> None:
        if not self._quiet:
            say(f"{self._label}: {self}", stream=self._stream)


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show life while something lasts of which nobody knows how long it takes."""
    with ProgressBar(quiet=manner.quiet) as progress:
        progress.start(0, label)
        yield
