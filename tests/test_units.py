"""Amounts for people: never a zero for something, never more digits than mean something."""

import pytest

from mergetool.units import filesize, memsize, several, timespan


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (3640, "3.64 kB"),
        (99_960, "100 kB"),
        (999_600, "1 MB"),
        (1.2e9, "1.2 GB"),
        (141e9, "141 GB"),
        (3e18, "3000 PB"),
    ],
)
def test_bytes_of_files(count, told):
    assert filesize(count) == told


@pytest.mark.parametrize(("count", "told"), [(300_000_000, "286 MiB"), (3.4 * 2**30, "3.4 GiB"), (1020, "0.996 KiB")])
def test_bytes_of_memory(count, told):
    assert memsize(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.04, "40 ms"),
        (0.096, "0.1 s"),
        (2.34, "2.3 s"),
        (25.4, "25 s"),
        (99.6, "2 min"),
        (300, "5 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations(seconds, told):
    assert timespan(seconds) == told


def test_one_thing_is_not_called_things():
    assert (several(1, "tensor"), several(0, "tensor"), several(12345, "setting")) == (
        "1 tensor",
        "0 tensors",
        "12,345 settings",
    )
