"""What many threads ask for at the same time is answered together: the part of a service that is not HTTP.

    together = Together(TextClassifier(model))     # any function of a list that gives as many answers
    together("a text")                             # from any thread, which waits for its own answer

Whatever comes while one batch is under way is the next one: alone, nobody waits for others, and under load batches grow
by themselves.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

Asked = tuple[Any, "Future[Any]"]


class Together:
    """Answers by the batch. `counts` has the answers and batches so far."""

    def __init__(
        self, answer: Callable[[list[Any]], Sequence[Any]], most: int = 32, patience: float | None = None
    ) -> None:
        """`most`: of a batch; `patience`: seconds that one may wait for its answer."""
        self._answer, self._most, self._patience = answer, most, patience
        self._asked: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self.counts: Counter[str] = Counter()
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many have been asked for, and are in no batch yet."""
        return self._asked.qsize()

    def __call__(self, one: Any) -> Any:
        """Its answer. Raises what answering raises, and TimeoutError where that takes too long."""
        future: Future[Any] = Future()
        self._asked.put((one, future))
        try:
            return future.result(self._patience)
        except TimeoutError:
            future.cancel()  # nobody waits for it any more: it is left out of its batch
            raise

    def _work(self) -> None:
        while True:
            batch = [self._asked.get()]
            while len(batch) < self._most and self.waiting:
                batch.append(self._asked.get())
            batch = [each for each in batch if each[1].set_running_or_notify_cancel()]
            if batch:
                self._give(batch)

    def _give(self, batch: list[Asked]) -> None:
        """Answers to all; where that fails, to each half, so that what cannot be answered is refused alone."""
        try:
            found = self._answer([one for one, _ in batch])
        except Exception as error:  # it belongs to whoever asked
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            self._give(batch[: len(batch) // 2])
            self._give(batch[len(batch) // 2 :])
            return
        self.counts.update(batches=1, answers=len(batch))
        for (_, future), answer in zip(batch, found, strict=True):
            future.set_result(answer)
