"""Ranges are moved whole, however few bytes the kernel takes at a time, and failures are in our words."""

import errno
import os
import resource
import signal

import pytest

from mergetool.errors import OutputError, SourceError
from mergetool.tensors.io import read_exact, sha256_file, write_error, write_exact


@pytest.fixture
def short_transfers(monkeypatch):
    """The real calls, but at most 3 bytes at a time (a kernel may do that; Linux stops at 2 GiB)."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))


def test_short_transfers_are_continued(tmp_path, short_transfers):
    data = bytes(range(256)) * 3
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    write_exact(fd, memoryview(data), 5, "f")
    assert (tmp_path / "f").read_bytes() == bytes(5) + data
    found = bytearray(len(data) - 10)
    read_exact(fd, memoryview(found), 15, "f")
    os.close(fd)
    assert found == data[10:]


def test_the_end_of_a_file_inside_a_range_is_an_error(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    with pytest.raises(SourceError, match="the file ends at byte 5, 3 bytes before the tensor does") as caught:
        read_exact(fd, memoryview(bytearray(6)), 2, "f: w")
    os.close(fd)
    assert caught.value.where == "f: w"


def test_a_descriptor_that_cannot_be_read_is_an_error(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(SourceError, match="cannot be read: Is a directory"):
        read_exact(fd, memoryview(bytearray(1)), 0, "f")
    os.close(fd)
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        sha256_file(tmp_path / "gone")


def test_a_limit_met_in_the_middle_of_a_write_is_an_error(tmp_path):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OutputError, match="larger than this system allows") as caught:
            write_exact(fd, memoryview(bytes(200)), 0, "f: w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        os.close(fd)
    assert (tmp_path / "f").stat().st_size == 100  # the kernel took a part; the rest was tried, and failed
    assert "shard_size" in caught.value.fix


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_write_errors_say_what_to_do(number, what):
    error = write_error(OSError(number, os.strerror(number)), "f")
    assert what in error.what
    assert "-o PATH" in error.fix
