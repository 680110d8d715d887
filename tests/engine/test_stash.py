"""What has been read of a unit is kept until it is merged, as far as there is room."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergetool.engine import stash
from mergetool.engine.stash import Stash
from mergetool.planning.graph import Operand
from mergetool.tensors.source import SafetensorsSource

ROWS = Operand("a", "w")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"w": torch.arange(8.0).bfloat16()}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def overwrite(file: Path) -> None:
    """The last 8 entries of the file become zeros, while it is open."""
    with file.open("r+b") as opened:
        opened.seek(-16, 2)
        opened.write(bytes(16))


def test_what_is_read_again_is_there_until_the_unit_is_done(file):
    reading = Stash({"a": SafetensorsSource([file], file)})
    with reading.keeping():
        assert reading.read(ROWS, 2, 3).tolist() == [2, 3, 4]
        overwrite(file)
        assert reading.read(ROWS, 2, 3).tolist() == [2, 3, 4]
        assert reading.read(ROWS, 2, 4).tolist() == [0, 0, 0, 0]
    with reading.keeping():
        assert reading.read(ROWS, 2, 3).tolist() == [0, 0, 0]


def test_what_has_no_room_is_read_again(file, monkeypatch):
    monkeypatch.setattr(stash, "KEPT_BYTES", 6)
    reading = Stash({"a": SafetensorsSource([file], file)})
    with reading.keeping():
        kept, passing = reading.read(ROWS, 1, 3), reading.read(ROWS, 4, 3)
        assert (kept.tolist(), passing.tolist()) == ([1, 2, 3], [4, 5, 6])
        overwrite(file)
        assert reading.read(ROWS, 1, 3).tolist() == [1, 2, 3]
        assert reading.read(ROWS, 4, 3).tolist() == [0, 0, 0]


def test_nothing_is_kept_outside_of_units(file):
    reading = Stash({"a": SafetensorsSource([file], file)})
    assert reading.read(ROWS, 1, 2).tolist() == [1, 2]
    overwrite(file)
    assert reading.read(ROWS, 1, 2).tolist() == [0, 0]
