"""Digests remembered between runs: right, or found anew."""

import hashlib
import json
import os

import pytest

from mergetool.errors import SourceError
from mergetool.tensors import digests
from mergetool.tensors.digests import remembered_sha256


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mergetool" / "digests.jsonl"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (1 << 16))
    return path


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr(digests, "_UNSETTLED_NS", -1)


def plain(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_hashed_once(cache, file, settled, monkeypatch):
    assert remembered_sha256(file) == plain(file)
    monkeypatch.delattr(digests, "sha256_file")
    assert remembered_sha256(file) == plain(file)
    assert remembered_sha256(file.parent / "." / file.name) == plain(file)


def test_a_file_written_just_now_is_not_remembered(cache, file):
    remembered_sha256(file)
    assert not cache.exists()


@pytest.mark.parametrize("same_times", [True, False])
def test_a_file_of_the_same_size_and_times_with_other_bytes_is_hashed_again(cache, file, settled, same_times):
    before = file.stat()
    remembered_sha256(file)
    with file.open("r+b") as opened:
        opened.write(b"other")
    if same_times:  # what a program can set
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert remembered_sha256(file) == plain(file)


def test_a_file_put_in_the_place_of_another_is_hashed_again(cache, file, settled):
    remembered_sha256(file)
    other = file.with_name("other")
    other.write_bytes(bytes(reversed(range(256))) * (1 << 16))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert remembered_sha256(file) == plain(file)


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", "7", "null", '["torn', "[1, 2, 3]", "\x00\x01"])
def test_lines_that_cannot_be_read_count_for_nothing(cache, file, settled, line):
    remembered_sha256(file)
    whole = cache.read_text()
    cache.write_text(f"{line}\n{whole}")
    assert remembered_sha256(file) == plain(file)
    assert cache.read_text().count("\n") == 2  # found, not hashed again
    entry = json.loads(whole)
    for digest in ("no digest", "ff", 7, None):
        cache.write_text(json.dumps([*entry[:-1], digest]) + "\n")
        assert remembered_sha256(file) == plain(file)


def test_a_memory_that_cannot_be_written_does_no_harm(cache, file, settled):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file is in the way")
    assert remembered_sha256(file) == plain(file)


def test_a_memory_that_has_grown_starts_anew(cache, file, settled):
    cache.parent.mkdir(parents=True)
    cache.write_text("x" * 100 + "\n" + "y" * (5 << 20))
    assert remembered_sha256(file) == plain(file)
    assert cache.stat().st_size < 1_000


def test_small_files_are_not_worth_remembering(cache, tmp_path, settled):
    small = tmp_path / "small"
    small.write_bytes(b"small")
    assert remembered_sha256(small) == plain(small)
    assert not cache.exists()


def test_a_file_that_is_not_there_is_an_error(cache, tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        remembered_sha256(tmp_path / "missing")
