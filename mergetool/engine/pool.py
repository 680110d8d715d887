"""Who does the arithmetic of a run: a worker for every thread, in that thread or in a process of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.engine.devices import one_thread, usable_device
from mergetool.planning import Plan
from mergetool.planning.graph import UNIT_ELEMENTS

if TYPE_CHECKING:
    from mergetool.bundle.store import FactorStore
    from mergetool.engine.fork import Fork
    from mergetool.engine.shelf import Shelves
    from mergetool.engine.sinks import Sink
    from mergetool.engine.worker import Worker


class WorkerPool:
    """The workers of one run. `plan` is what new workers go by: a fit gives a new one before the first is asked for."""

    def __init__(self, plan: Plan, sink: "Sink") -> None:
        self.plan = plan
        self.device = "cpu"
        self.length = UNIT_ELEMENTS
        """Elements of a step that are given to a worker at once: whole units."""
        self.memory: int | None = None
        """Bytes for whole tensors, where these lie on a device and that is known."""
        self._sink = sink
        self.store: FactorStore | None = None
        self._shelves: Shelves | None = None
        self._threads = 1
        self._slice: int | None = None
        self._local = threading.local()
        self._forks: list[Fork] = []
        self._idle: list[Fork] = []

    @contextmanager
    def ready(self, device: str, cache: Path | None, workers: int = 1) -> Iterator[None]:
        """Import torch (threads may be hashing meanwhile), check the device, and leave each worker one thread.

        So many workers, of all processes here, share the device's memory.

        Raises PlanError for a device that cannot be used.
        """
        from mergetool.bundle.store import FactorStore

        self.device = usable_device(device, double=self.plan.needs_float64)
        self._share_memory(workers)
        self.store = FactorStore(cache) if cache else None
        with one_thread() as self._threads:
            yield

    def _share_memory(self, workers: int) -> None:
        if self.device != "cpu":
            import torch

            from mergetool.engine.device_worker import memory_for_whole, slice_elements

            self._slice = slice_elements(self.plan, torch.device(self.device), workers)
            self.memory = memory_for_whole(torch.device(self.device))
            self.length = max(UNIT_ELEMENTS, self._slice)

    @contextmanager
    def resting(self, processes: int) -> Iterator[None]:
        """While inside, no worker computes: torch has all threads, which the processes of a machine share."""
        import torch

        torch.set_num_threads(max(1, self._threads // processes))
        yield
        torch.set_num_threads(1)

    @property
    def _sliced(self) -> bool:
        """Whether no step needs a tensor whole."""
        return all(step.granularity != "tensor" for step in self.plan.steps)

    def fork(self, count: int, held: int) -> OSError | None:
        """Give `count` workers processes of their own, where that pays; they must not hold the file descriptor `held`.

        Not for programs that have threads of their own. Returns why that was not possible: then threads do the work.
        """
        refused: OSError | None = None
        if self.device != "cpu" or not self._sliced:
            return refused
        from mergetool.engine.fork import Fork

        steps = {step.index: step for step in self.plan.steps}
        try:
            for _ in range(count):
                others = [held, *(fork.fileno() for fork in self._forks)]
                self._forks.append(Fork(self.new(), steps, others))
        except OSError as error:  # no more processes, files or memory are allowed
            refused = error
            self.close()
            self._forks = []
        self._idle = list(self._forks)
        return refused

    def mine(self) -> "Worker | Fork":
        """The worker of the thread that asks."""
        if not hasattr(self._local, "worker"):
            self._local.worker = self._idle.pop() if self._forks else self.new()
        worker: Worker | Fork = self._local.worker
        return worker

    def new(self) -> "Worker":
        """A worker in the thread that asks."""
        from mergetool.engine.shelf import Shelves

        worker = self._new()
        worker.shelves = self._shelves = self._shelves or Shelves()
        return worker

    def _new(self) -> "Worker":
        import torch

        from mergetool.engine.worker import Worker

        if self.device == "cpu":
            return Worker(self.plan, self._sink, self.store)
        from mergetool.engine.device_worker import DeviceWorker

        return DeviceWorker(self.plan, self._sink, torch.device(self.device), self.store, self._slice)

    def close(self) -> int:
        """End the processes, when no thread uses them any more. Returns the bytes of memory they had of their own."""
        return sum(fork.close() for fork in self._forks)
