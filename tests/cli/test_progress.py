"""Progress as a log shows it: life at once and every now and then, and numbers that mean something."""

import io
import re
import time

import pytest

from mergetool.cli.progress import ProgressBar
from mergetool.cli.show import manner


@pytest.fixture
def log(monkeypatch):
    """A progress display that writes lines into `log.stream`, many a second."""
    monkeypatch.setattr(manner, "quiet", False)
    stream = io.StringIO()
    bar = ProgressBar(every=0.02, stream=stream)
    bar.stream = stream
    return bar


def lines_when(bar, number):
    deadline = time.monotonic() + 5
    while len(bar.stream.getvalue().splitlines()) < number and time.monotonic() < deadline:
        time.sleep(0.01)
    return bar.stream.getvalue().splitlines()


def test_a_line_at_once_and_then_how_much_how_fast_and_how_long(log):
    with log:
        log.start(4_000_000_000, "merging")
        assert log.stream.getvalue() == "merging: 0% of 4 GB\n"
        log.advance(1_000_000_000)  # what an earlier run has done tells nothing of the speed
        assert "left" not in lines_when(log, 3)[-1]
        log.advance(1_000_000_000)
        last = lines_when(log, len(log.stream.getvalue().splitlines()) + 3)[-1]
    assert re.fullmatch(r"merging: 50% of 4 GB, [0-9.]+ .B/s, [0-9.]+ m?s left", last)


def test_a_stage_of_unknown_length_shows_life_too(log):
    with log:
        log.start(0, "opening models and tasks")
        assert re.fullmatch(r"opening models and tasks: [0-9.]+ m?s so far", lines_when(log, 2)[-1])


def test_questions_are_counted_as_such(log):
    with log:
        log.start(1200, "searching", "items")
        assert log.stream.getvalue() == "searching: 0% of 1,200 items\n"
        log.advance(0)
        log.advance(300)
        assert re.search(r"searching: 25% of 1,200 items, [0-9.,]+ items/s, .* left", lines_when(log, 3)[-1])


def test_after_the_end_nothing_is_written(log):
    with log:
        log.start(10, "merging")
    told = log.stream.getvalue()
    time.sleep(0.1)
    assert log.stream.getvalue() == told
