"""Folders that go with their owner; those of killed programs go with the next, those of living ones stay."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mergetool.tensors.temporary import folder_of

HOLDER = """
import sys
from mergetool.tensors.temporary import folder_of

class Owner: ...

owner = Owner()
print(folder_of(owner), flush=True)
sys.stdin.read()
"""


class Owner:
    pass


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def holder(place):
    """A program that holds a folder, made long ago."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=-1, stdout=-1, text=True) as process:
        folder = process.stdout.readline().strip()
        os.utime(folder, (0, 0))
        yield process, folder
        process.kill()


def test_a_folder_goes_with_its_owner(place):
    owner = Owner()
    folder_of(owner).joinpath("file").write_text("")
    assert len(list(place.iterdir())) == 1
    del owner
    assert not list(place.iterdir())


def test_what_a_living_program_holds_stays(holder):
    _, folder = holder
    folder_of(Owner())
    assert Path(folder).is_dir()


def test_what_a_killed_program_left_goes_with_the_next(holder):
    process, folder = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Path(folder).is_dir()
    folder_of(Owner())
    assert not Path(folder).exists()


def test_a_folder_that_may_not_be_locked_yet_stays(place):
    new = place / "mergetool-planned-new"
    new.mkdir()
    folder_of(Owner())
    assert new.exists()


def test_links_lead_nowhere_when_a_folder_is_removed(holder, place):
    process, folder = holder
    (place / "model").mkdir()
    (place / "model" / "weights").write_text("")
    (Path(folder) / "link").symlink_to(place / "model")
    os.utime(folder, (0, 0))
    process.kill()
    process.wait()
    folder_of(Owner())
    assert not Path(folder).exists()
    assert (place / "model" / "weights").exists()
