"""Who does what next: a queue of jobs that knows which must wait for which, and how much memory each needs.

Jobs run in plan order, which is file order. A tensor that needs surveys is read first for counting; its merge units
join the queue when the last count has been concluded. A job is handed out only while the memory of all running jobs
stays within the budget (one job may always run).

Some jobs only hash. They leave the interpreter's lock alone, which those that compute contend for; so while there is
anything to compute, at most half of the threads hash, and both kinds get done at the same time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any


@dataclass(frozen=True)
class Job:
    """Work for one thread: `run` does it, then `after` (serialised with all other `after`s) records it."""

    run: Callable[[], Any]
    """Returns what `after` needs."""
    after: Callable[[Any], None]
    memory: int = 0
    """Bytes it holds while running, beyond a worker's own buffers."""
    hint: Callable[[], None] | None = None
    """Tells the disk that this job's inputs are wanted soon."""
    hashes: bool = False
    """It only hashes."""


class Schedule:
    """A blocking queue of jobs. `after` callbacks may add jobs; the first error stops everything."""

    def __init__(self, memory: int = 0, num_threads: int = 0) -> None:
        """`memory` for all running jobs, in bytes. Without threads, whoever waits does the work."""
        self._memory = memory
        self.num_threads = num_threads
        self._used = 0
        self._running = 0
        self._hashing = 0
        self._open = True
        self._ready: deque[Job] = deque()
        self._to_hash: deque[Job] = deque()
        self._changed = Condition()
        self.error: BaseException | None = None

    def limit(self, memory: int) -> None:
        """From now on, so many bytes for all running jobs."""
        with self._changed:
            self._memory = memory
            self._changed.notify_all()

    def add(self, jobs: Iterable[Job], *, first: bool = False) -> None:
        """Queue jobs, at the end or before all others of their kind."""
        jobs = list(jobs)
        with self._changed:
            for queue, hashes in ((self._ready, False), (self._to_hash, True)):
                chosen = [job for job in jobs if job.hashes == hashes]
                if first:
                    queue.extendleft(reversed(chosen))
                else:
                    queue.extend(chosen)
            self._changed.notify_all()

    def record(self, call: Callable[[], None]) -> None:
        """Have something recorded that no job of this process did: `call` is serialised with the `after`s."""
        with self._changed:
            call()
            self._changed.notify_all()

    def close(self) -> None:
        """No more jobs from outside: once the queue is empty and nothing runs, threads may go home."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """Let running jobs end and start no others. The first error is kept."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until something is so. Raises the first error of any job.

        (An interrupted `Thread.join` takes its thread for ended, so nobody waits for threads instead.)
        """
        while self.num_threads == 0 and self.error is None and not done():
            self._work_once()
        with self._changed:
            while self.error is None and not done():
                self._changed.wait()
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Wait until all is done. Raises the first error of any job."""
        self.wait_for(lambda: self._finished)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """While inside, as many threads as there are to be take jobs. Where something fails, they end what they do."""
        threads = [Thread(target=self.work, daemon=True) for _ in range(self.num_threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException as error:
            self.stop(error)
            raise
        finally:
            for thread in threads:
                thread.join()

    def work(self) -> None:
        """One thread's life: take jobs until there are none left or something failed."""
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        taken = self._take()
        if taken is None:
            return False
        job, hint = taken
        try:
            if hint is not None:
                hint()
            result = job.run()
            with self._changed:
                job.after(result)
        except BaseException as error:  # whatever it is, the main thread must hear of it
            self.stop(error)
        finally:
            self._give_back(job)
        return True

    @property
    def _finished(self) -> bool:
        return not (self._ready or self._to_hash or self._running or self._open)

    def _take(self) -> tuple[Job, Callable[[], None] | None] | None:
        """A job, and the hint of the one that follows it; None when there are no more."""
        with self._changed:
            while self.error is None and not self._finished:
                if (job := self._next()) is not None:
                    self._running += 1
                    self._hashing += job.hashes
                    self._used += job.memory
                    return job, self._ready[0].hint if self._ready and not job.hashes else None
                self._changed.wait()
            return None

    def _next(self) -> Job | None:
        computing = self._running - self._hashing
        fits = bool(self._ready) and (computing == 0 or self._used + self._ready[0].memory <= self._memory)
        if self._to_hash and (not fits or 2 * self._hashing < self.num_threads):
            return self._to_hash.popleft()
        return self._ready.popleft() if fits else None

    def _give_back(self, job: Job) -> None:
        with self._changed:
            self._running -= 1
            self._hashing -= job.hashes
            self._used -= job.memory
            self._changed.notify_all()
