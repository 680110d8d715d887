"""What many threads ask for is answered together: to each its own answer or error, and nobody waits in vain."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mergetool.bundle.together import Together


def held():
    """A function of lists that waits, in its first call, until it is let go; and all lists that it was called with."""
    go, began, calls = threading.Event(), threading.Event(), []

    def answer(several):
        calls.append(several)
        began.set()
        assert go.wait(60)
        if "bad" in several:
            raise ValueError(f"bad among {len(several)}")
        return [each.upper() for each in several]

    return answer, go, began, calls


def ask_while_busy(texts, **options):
    """The calls for these texts, that all came while one was answered, and futures of their answers."""
    answer, go, began, calls = held()
    together, pool = Together(answer, **options), ThreadPoolExecutor(len(texts) + 1)
    first = pool.submit(together, "first")
    assert began.wait(60)
    found = [pool.submit(together, text) for text in texts]
    while together.waiting < len(texts):
        time.sleep(0.001)
    go.set()
    assert first.result(60) == "FIRST"
    return together, calls, found


def test_what_comes_while_one_is_answered_is_the_next_batch():
    texts = list("abcdefg")
    together, calls, found = ask_while_busy(texts, most=5)
    assert [each.result(60) for each in found] == [text.upper() for text in texts]
    assert [len(call) for call in calls] == [1, 5, 2]
    assert together.counts == {"answers": 8, "batches": 3}
    assert together.waiting == 0


def test_one_that_cannot_be_answered_is_told_so_alone_in_few_more_calls():
    texts = [*map(str, range(15)), "bad"]
    together, calls, found = ask_while_busy(texts)
    assert [each.result(60) for each in found[:-1]] == texts[:-1]
    with pytest.raises(ValueError, match="bad among 1"):
        found[-1].result(60)
    assert len(calls) == 1 + 1 + 2 * 4
    assert together.counts["answers"] == 16


def test_one_that_waited_too_long_is_told_so_and_left_out():
    answer, go, began, calls = held()
    together = Together(answer, patience=0.2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(together, "first")
        assert began.wait(60)
        with pytest.raises(TimeoutError):
            together("late")
        assert isinstance(first.exception(60), TimeoutError)
        go.set()
    assert together("again") == "AGAIN"
    assert calls == [["first"], ["again"]]
