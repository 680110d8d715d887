"""Workers in processes of their own: what the command uses where steps are merged in slices on a CPU.

Operations on slices are short, and before each the interpreter's lock must be had: threads would spend a quarter of
their time waiting for one another on two cores, and most of it on many. A forked process has a lock of its own, shares
with its parent all that was imported, opened and planned, and is there within milliseconds.

The parent's threads keep everything else: what comes next, the journal, the hashing. A thread hands a unit of work to
its process and sleeps until that has answered. A process whose parent is gone ends after the unit in hand.
"""

import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mergetool.engine.worker import Worker
from mergetool.errors import MergeError, MergetoolError
from mergetool.methods.base import StatisticsPass, Stats
from mergetool.methods.group import Note
from mergetool.planning import Step


class Fork:
    """The face of a worker that lives in a forked process. Used by one thread at a time."""

    def __init__(self, worker: Worker, steps: Mapping[int, Step], others: Iterable[int]) -> None:
        """Fork now. `others` are file descriptors that the new process must not hold on to."""
        ours, theirs = Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for good in the child: the parent decides
        try:
            with warnings.catch_warnings():  # there are threads, but none holds a lock that the new process takes
                warnings.simplefilter("ignore", DeprecationWarning)
                with _signals_later():
                    self._process = os.fork()
            if self._process == 0:
                _serve(worker, steps, theirs, (ours.fileno(), *others))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._pipe = ours

    def fileno(self) -> int:
        """Our end of the pipe."""
        return self._pipe.fileno()

    def count(self, step: Step, start: int, stop: int, counts: StatisticsPass) -> Tensor:
        """See `Worker.count`. Raises MergeError when the process has died."""
        return torch.from_numpy(self._ask("count", step.index, start, stop, counts))

    def perform(self, step: Step, start: int, stop: int, stats: Stats) -> list[Note]:
        """See `Worker.perform`. Raises MergeError when the process has died."""
        notes: list[Note] = self._ask("perform", step.index, start, stop, stats)
        return notes

    def visit(self, step: Step, counts: StatisticsPass) -> tuple[Stats, list[Note], list[int]]:
        """See `Worker.visit`. Raises MergeError when the process has died."""
        made: tuple[Stats, list[Note], list[int]] = self._ask("visit", step.index, 0, 0, counts)
        return made

    def close(self) -> int:
        """End the process. Returns the bytes of memory that it had for itself, as far as is known."""
        own = 0
        with suppress(OSError, EOFError):
            self._pipe.send_bytes(pickle.dumps(None))
            own = pickle.loads(self._pipe.recv_bytes())
        self._pipe.close()
        with suppress(ChildProcessError):
            os.waitpid(self._process, 0)
        return own

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send_bytes(pickle.dumps(request))
            answer, error = pickle.loads(self._pipe.recv_bytes())
        except (OSError, EOFError):
            raise MergeError(
                "a worker process was killed before its work was done",
                f"process {self._process}",
                "run again, it resumes; if memory ran out, give --memory SIZE or fewer --workers",
            ) from None
        if error is not None:
            raise error
        return answer


@contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that come inside are handled at the end: Python drops what their handlers raise in the hooks of a fork.

    A mask cannot do that: another thread takes the signal in, and its handler still runs in the main one.
    """
    main = threading.current_thread() is threading.main_thread()  # elsewhere no handler runs
    both = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    handlers = {number: handler for number, handler in both.items() if handler is not None}
    came: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signalled in came:
            signal.raise_signal(signalled)


def _serve(worker: Worker, steps: Mapping[int, Step], pipe: Connection, others: Iterable[int]) -> NoReturn:
    """Answer requests until there is nobody to ask, in the new process. Nothing of the parent's may happen here."""
    try:
        for descriptor in others:
            os.close(descriptor)
        while (request := pickle.loads(pipe.recv_bytes())) is not None:
            pipe.send_bytes(_answer(worker, steps, *request))
        pipe.send_bytes(pickle.dumps(_own()))
    except (OSError, EOFError):  # the parent is gone
        pass
    finally:
        os._exit(0)


def _answer(
    worker: Worker, steps: Mapping[int, Step], kind: str, step: int, start: int, stop: int, extra: Any
) -> bytes:
    """The pickled answer to one request, and the error if there was one."""
    try:
        if kind == "count":
            return pickle.dumps((worker.count(steps[step], start, stop, extra).numpy(), None))
        if kind == "visit":
            return pickle.dumps((worker.visit(steps[step], extra), None))
        return pickle.dumps((worker.perform(steps[step], start, stop, extra), None))
    except MergetoolError as error:
        return pickle.dumps((None, error))
    except BaseException:
        return pickle.dumps((None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def _own() -> int:
    """Bytes of memory that this process shares with no other. Its buffers are kept to the end."""
    with suppress(OSError):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
    return 0
