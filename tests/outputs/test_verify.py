"""Verifying finds what became of a result: every changed byte, missing file and value that is not finite."""

import json
import os
from pathlib import Path

import pytest
import torch

import mergetool
from mergetool.errors import SourceError
from mergetool.outputs.verify import verify_output
from tests.files import tensors, write_model, write_models


@pytest.fixture
def result(tmp_path):
    """A merge in three files, with a config and a tokenizer."""
    write_models(tmp_path, names=("a", "b"))
    (tmp_path / "a/config.json").write_text("{}")
    (tmp_path / "a/config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "a/tokenizer.json").write_text("{}")
    models = {name: str(tmp_path / name) for name in "ab"}
    recipe = {"models": models, "merge": {"method": "linear"}, "output": {"shard_size": 1000}}
    return mergetool.run(recipe, output=tmp_path / "out").path


def refused(path):
    with pytest.raises(SourceError) as caught:
        verify_output(path)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_sound_result_is_found_sound(result):
    report = verify_output(result)
    names = {path.name for path in result.iterdir()}
    assert report["files_checked"] == len(names) - 1  # all but the lock itself
    assert report["tensors"] == 6


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "README.md"],
)
def test_one_flipped_bit_in_any_file_is_found(result, name):
    path = result / name
    data = bytearray(path.read_bytes())
    place = len(data) - 3 if name.endswith(".safetensors") else data.index(b"e" if b"e" in data else b"{")
    data[place] ^= 0x20 if name.endswith(".json") else 1
    path.write_bytes(data)
    error = refused(result)
    assert (Path(error.where).name, error.what.partition(" is ")[0]) == (name, "SHA-256")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json", "config.json"])
def test_a_missing_file_is_found(result, name):
    (result / name).unlink()
    error = refused(result)
    assert str(result / name) in error.where
    assert "No such file" in error.what


def test_a_file_cut_off_is_found(result):
    path = result / "model-00003-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert refused(result).where == str(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str
)
def test_values_that_are_not_finite_are_found(tmp_path, value, dtype):
    write_model(tmp_path, tensors(0) | {"w": torch.tensor([1.0, value]).to(dtype)})
    assert refused(tmp_path).what == "1 tensors hold values that are not finite: w"


def test_large_finite_values_are_finite(tmp_path):
    write_model(tmp_path, {"w": torch.tensor([1e300], dtype=torch.float64), "n": torch.tensor([2**63 - 1])})
    report = verify_output(tmp_path)
    assert report["files_checked"] is None
    assert "no lock" in report["summary"]


@pytest.mark.parametrize(
    "lock",
    ["", "{", "[]", "{}", '{"output": 1}', '{"output": {"files": []}}', "[" * 100_000, "\xff"],
)
def test_a_broken_lock_is_refused(result, lock):
    (result / "mergetool.json").write_bytes(lock.encode("latin-1"))
    assert refused(result).what == "the lock cannot be read"


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "a/../../secret"])
def test_a_lock_cannot_make_us_read_other_files(result, name):
    (result.parent / "secret").write_text("secret")
    (result / "mergetool.json").write_text(json.dumps({"output": {"files": {name: "00"}}}))
    assert "is not in this folder" in refused(result).what


def test_a_lock_cannot_make_us_read_for_ever(result):
    os.mkfifo(result / "pipe")
    (result / "mergetool.json").write_text(json.dumps({"output": {"files": {"pipe": "00"}}}))
    assert refused(result).what == "is not a file"
