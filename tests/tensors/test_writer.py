"""Output files: slots filled in any order give the file that the reference writes."""

import random

import pytest
import torch
from safetensors.torch import save

from mergetool.errors import OutputError
from mergetool.planning.graph import Shard
from mergetool.tensors.dtypes import of_torch
from mergetool.tensors.header import TensorSpec, lay_out
from mergetool.tensors.writer import SlotWriter, write_file


def layout(state, name="model.safetensors"):
    specs = [TensorSpec(key, of_torch(tensor.dtype), tuple(tensor.shape)) for key, tensor in state.items()]
    return Shard(name, *lay_out(specs, {"format": "pt"}))


STATE = {
    "w": torch.randn(5, 7),
    "half": torch.randn(9).half(),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
}


def fill(writer, pieces):
    for name, begin, data in pieces:
        writer.write(0, name, begin, memoryview(data))


def pieces_of(state, size=4):
    stored = {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in state.items() if t.numel()}
    return [(n, at, data[at : at + size]) for n, data in stored.items() for at in range(0, len(data), size)]


def test_slots_filled_in_any_order_give_the_file_of_the_reference_writer(tmp_path):
    pieces = pieces_of(STATE)
    random.Random(0).shuffle(pieces)
    writer = SlotWriter(tmp_path, [layout(STATE)])
    assert (tmp_path / "model.safetensors").stat().st_size == len(save(STATE, {"format": "pt"}))
    fill(writer, pieces)
    writer.sync(0)
    writer.close()
    assert (tmp_path / "model.safetensors").read_bytes() == save(STATE, {"format": "pt"})


def test_a_second_writer_keeps_what_is_there(tmp_path):
    pieces = pieces_of(STATE)
    for some in (pieces[:10], pieces[10:]):
        writer = SlotWriter(tmp_path, [layout(STATE)])
        fill(writer, some)
        writer.close()
    assert (tmp_path / "model.safetensors").read_bytes() == save(STATE, {"format": "pt"})


def test_nothing_is_written_outside_a_slot(tmp_path):
    writer = SlotWriter(tmp_path, [layout(STATE)])
    with pytest.raises(AssertionError, match="leave the slot"):
        writer.write(0, "w", 5 * 7 * 4 - 2, memoryview(b"1234"))
    writer.close()


def test_a_folder_that_is_gone_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        SlotWriter(tmp_path / "gone", [layout(STATE)])


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "config.json", "old")
    (tmp_path / ".config.json.tmp").mkdir()  # the sibling cannot be made
    with pytest.raises(OutputError):
        write_file(tmp_path / "config.json", "new")
    assert (tmp_path / "config.json").read_text() == "old"
    (tmp_path / ".config.json.tmp").rmdir()
    write_file(tmp_path / "config.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "new"
