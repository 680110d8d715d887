"""The digest of a file that is still being filled is that of the file, in whatever order it was filled."""

import hashlib
import random

import pytest

from mergetool.engine import incremental_hash as front
from mergetool.engine.incremental_hash import IncrementalHash

HEADER, SIZE = 17, 1000
DATA = random.Random(0).randbytes(SIZE)
UNITS = [(begin, min(begin + 50, SIZE)) for begin in range(HEADER, SIZE, 50)]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(DATA[:HEADER] + bytes(SIZE - HEADER))
    return tmp_path / "file"


def fill(path, begin, end):
    with path.open("r+b") as opened:
        opened.seek(begin)
        opened.write(DATA[begin:end])


@pytest.mark.parametrize("step", [1, 120, 10_000])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_units_in_any_order_give_the_digest_of_the_file(step, seed, file, monkeypatch):
    monkeypatch.setattr(front, "_STEP", step)
    units = UNITS if seed is None else random.Random(seed).sample(UNITS, len(UNITS))
    growing, digests = IncrementalHash(file, SIZE, HEADER), []
    for begin, end in units:
        fill(file, begin, end)
        growing.add(begin, end)
        if growing.take():
            digests.append(growing.hash())
    assert digests[-1] == hashlib.sha256(DATA).hexdigest()
    assert set(digests[:-1]) <= {None}
    assert growing.complete
    assert not growing.take()


def test_what_lies_behind_a_gap_is_left_alone(file, monkeypatch):
    monkeypatch.setattr(front, "_STEP", 1)
    growing = IncrementalHash(file, SIZE, HEADER)
    assert growing.take()
    growing.hash()
    growing.add(*UNITS[1])
    assert not growing.take()
    growing.add(*UNITS[0])
    assert growing.take()


def test_one_thread_hashes_at_a_time_and_what_came_meanwhile_comes_next(file, monkeypatch):
    monkeypatch.setattr(front, "_STEP", 1)
    growing = IncrementalHash(file, SIZE, HEADER)
    assert growing.take()
    growing.add(*UNITS[0])
    assert not growing.take()
    growing.hash()
    growing.add(*UNITS[1])
    assert growing.take()


def test_a_file_that_is_only_a_header_is_complete(file):
    growing = IncrementalHash(file, HEADER, HEADER)
    assert growing.take()
    assert growing.hash() == hashlib.sha256(DATA[:HEADER]).hexdigest()
