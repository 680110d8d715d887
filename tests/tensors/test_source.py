"""Models on the disk: sound ones are read to the bit, broken and hostile ones refused by name."""

import json
import os
import pickle

import pytest
import torch
from torch.torch_version import TorchVersion

from mergetool.errors import SourceError
from mergetool.tensors.folder import open_model
from mergetool.tensors.source import FileStamp, MemorySource
from tests.files import tensors, write_model, write_raw


def everything(source):
    """All tensors of a source, read slice by slice (7 bytes at a time) as stored."""
    found = {}
    for name, spec in source.specs.items():
        data = bytearray(spec.num_bytes)
        for begin in range(0, len(data), 7):
            source.read_bytes(name, begin, memoryview(data)[begin : begin + 7])
        found[name] = bytes(data)
    source.close()
    return found


def stored(state):
    return {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in state.items()}


def refused(path):
    with pytest.raises(SourceError) as caught:
        open_model(path)
    assert caught.value.fix
    return caught.value


def sharded(folder, state, files=("model-1.safetensors", "model-2.safetensors")):
    """A model in two files with an index; returns the index's weight map."""
    names = list(state)
    half = len(names) // 2
    write_model(folder, {name: state[name] for name in names[:half]}, file=files[0])
    write_model(folder, {name: state[name] for name in names[half:]}, file=files[1])
    weight_map = {name: files[place >= half] for place, name in enumerate(names)}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -------------------------------------------------------------------- what is read


def test_one_file_a_folder_and_shards_hold_the_same_tensors(tmp_path):
    state = tensors(0)
    write_model(tmp_path / "one", state)
    sharded(tmp_path / "two", state)
    for path in (tmp_path / "one", tmp_path / "one/model.safetensors", tmp_path / "two"):
        assert everything(open_model(path)) == stored(state)


def test_only_files_in_the_index_count(tmp_path):
    state = tensors(0)
    sharded(tmp_path / "m", state)
    write_model(tmp_path / "m", {"stray": torch.ones(2)}, file="consolidated.safetensors")
    write_model(tmp_path / "m", {"stray": torch.ones(2)}, file="model-3.safetensors")
    assert everything(open_model(tmp_path / "m")) == stored(state)


def test_a_tensor_in_two_shards_is_read_from_the_one_the_index_names(tmp_path):
    write_model(tmp_path / "m", {"w": torch.zeros(2)}, file="model-1.safetensors")
    write_model(tmp_path / "m", {"w": torch.ones(2), "v": torch.ones(2)}, file="model-2.safetensors")
    for file, value in (("model-1.safetensors", torch.zeros(2)), ("model-2.safetensors", torch.ones(2))):
        write_index(tmp_path / "m", {"w": file, "v": "model-2.safetensors"})
        assert everything(open_model(tmp_path / "m"))["w"] == stored({"w": value})["w"]


def test_the_symlinks_of_a_hub_cache_are_followed(tmp_path):
    state = tensors(0)
    blobs = tmp_path / "blobs"
    weight_map = sharded(blobs, state)
    snapshot = tmp_path / "snapshots/abc"
    snapshot.mkdir(parents=True)
    for place, file in enumerate([*dict.fromkeys(weight_map.values()), "model.safetensors.index.json"]):
        (blobs / file).rename(blobs / f"{place:064x}")
        (snapshot / file).symlink_to(f"../../blobs/{place:064x}")
    assert everything(open_model(snapshot)) == stored(state)


def test_a_state_dict_in_memory_is_read_as_stored():
    state = {
        "w": torch.randn(5, 3).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "strided": torch.arange(10)[::3],
    }
    assert everything(MemorySource(state)) == stored({name: value.detach() for name, value in state.items()})


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_no_file_can_hold_is_refused(name):
    with pytest.raises(SourceError, match="no tensor can be stored under the name"):
        MemorySource({name: torch.ones(1)})


NEWER = [getattr(torch, "float4_e2m1fn_x2")] if hasattr(torch, "float4_e2m1fn_x2") else []  # noqa: B009


@pytest.mark.parametrize("dtype", [torch.complex128, *NEWER])
def test_a_dtype_that_no_file_can_hold_is_refused(dtype):
    with pytest.raises(SourceError, match="cannot be stored"):
        MemorySource(
            {"w": torch.zeros(2, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(2, dtype=dtype)}
        )


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", ""])
def test_an_index_may_not_leave_its_folder(tmp_path, file):
    write_model(tmp_path, {"w": torch.ones(2)}, file="secret.safetensors")
    write_model(tmp_path / "m/sub", {"w": torch.ones(2)})
    write_index(tmp_path / "m", {"w": file})
    error = refused(tmp_path / "m")
    assert f"weight_map sends 'w' to {file!r}" in error.what
    assert error.where == str(tmp_path / "m/model.safetensors.index.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"w": 1}}', "no weight_map"),
        ('{"weight_map": ["w"]}', "no weight_map"),
        ("\xff", "not valid JSON"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    error = refused(tmp_path)
    assert message in error.what
    assert error.where == str(tmp_path / "model.safetensors.index.json")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    sharded(tmp_path, tensors(0))
    (tmp_path / "model-2.safetensors").unlink()
    error = refused(tmp_path)
    assert error.what == "cannot be read: No such file or directory"
    assert error.where == str(tmp_path / "model-2.safetensors")


def test_a_stale_index_is_refused(tmp_path):
    weight_map = sharded(tmp_path, tensors(0))
    write_index(tmp_path, {**weight_map, "gone": "model-1.safetensors"})
    error = refused(tmp_path)
    assert error.what == "the index says model-1.safetensors holds tensor 'gone', but it does not"


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path):
    weight_map = sharded(tmp_path, tensors(0))
    first = next(iter(weight_map))
    write_index(tmp_path, {**weight_map, first: "model-2.safetensors"})
    assert f"the index says model-2.safetensors holds tensor {first!r}" in refused(tmp_path).what


def test_one_broken_shard_is_named(tmp_path):
    sharded(tmp_path, tensors(0))
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    error = refused(tmp_path)
    assert error.where == str(path)
    assert "tensors end at byte" in error.what


def test_a_folder_without_a_model_is_refused(tmp_path):
    write_model(tmp_path, {"w": torch.ones(2)}, file="adapter_model.safetensors")
    error = refused(tmp_path)
    assert error.what.startswith("no model in this folder (looked for model.safetensors.index.json, model.safetensors,")


@pytest.mark.parametrize("name", ["model.gguf", "model", "model.bin2"])
def test_other_file_types_are_refused(tmp_path, name):
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    assert "is not a file type that can be merged" in refused(tmp_path / name).what


def test_a_missing_model_is_refused_with_a_hint_about_the_hub(tmp_path):
    error = refused(tmp_path / "org/model")
    assert error.what == "no such file or folder"
    assert "ORG/NAME@REVISION" in error.fix


def test_the_output_of_an_unfinished_run_is_called_that(tmp_path):
    (tmp_path / "merged.partial").mkdir()
    assert "unfinished run" in refused(tmp_path / "merged").fix


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"])
def test_paths_that_no_system_allows_are_refused(tmp_path, name):
    refused(tmp_path / name)


def test_a_loop_of_symlinks_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")
    write_index(tmp_path, {"w": "model-1.safetensors"})
    (tmp_path / "model-1.safetensors").symlink_to("model-1.safetensors")
    assert "symbolic links" in refused(tmp_path).what


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_shard_that_is_no_file_is_refused_without_reading_it(tmp_path, kind):
    write_index(tmp_path, {"w": "model-1.safetensors"})
    path = tmp_path / "model-1.safetensors"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": lambda p: p.mkdir()}[kind](path)
    error = refused(tmp_path)  # opening a pipe would wait for ever
    assert error.what == "is not a file"
    assert error.where == str(path)


def test_a_file_cut_off_after_its_header_was_read_is_found_when_read(tmp_path):
    write_model(tmp_path, {"w": torch.ones(100)})
    source = open_model(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(SourceError, match=r"the file ends at byte 300, .* before the tensor does"):
        everything(source)


def test_a_file_removed_after_its_header_was_read_is_found_when_read(tmp_path):
    write_model(tmp_path, {"w": torch.ones(100)})
    source = open_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert source.files[0].changed()
    with pytest.raises(SourceError, match="No such file"):
        source.will_need("w", 0, 4)
    with pytest.raises(SourceError, match="No such file"):
        everything(source)


def test_a_stamp_notices_a_change(tmp_path):
    path = write_raw(tmp_path / "f", "{}")
    stamp = FileStamp.of(path)
    assert not stamp.changed()
    os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns + 1))
    assert stamp.changed()


# -------------------------------------------------------------------- .bin files


def write_bin(folder, loaded, file="pytorch_model.bin", **options):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(loaded, folder / file, **options)
    return folder


def test_a_bin_file_is_read_as_stored(tmp_path):
    state = tensors(0, dtype=torch.bfloat16) | {"transposed": torch.randn(3, 2).T, "scalar": torch.tensor(1.5)}
    assert everything(open_model(write_bin(tmp_path, state))) == stored(state)


def test_sharded_bin_files_are_read_through_their_index(tmp_path):
    state = tensors(0)
    names = list(state)
    write_bin(tmp_path, {n: state[n] for n in names[:3]} | {"stray": torch.ones(1)}, "pytorch_model-1.bin")
    write_bin(tmp_path, {n: state[n] for n in names[3:]}, "pytorch_model-2.bin")
    weight_map = {name: f"pytorch_model-{1 + (place >= 3)}.bin" for place, name in enumerate(names)}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    source = open_model(tmp_path)
    assert [stamp.path.name for stamp in source.files] == ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    assert source.position(names[4])[0] == 1
    assert everything(source) == stored(state)
    write_index(tmp_path, {**weight_map, "gone": "pytorch_model-1.bin"}, "pytorch_model.bin.index.json")
    assert "holds tensor 'gone', but it does not" in refused(tmp_path).what


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_bin_file_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    write_bin(tmp_path / "m", {"w": torch.ones(2), "x": Canary(canary)})
    error = refused(tmp_path / "m")
    assert "may hold code" in error.what
    write_bin(tmp_path / "old", {"x": Canary(canary)}, _use_new_zipfile_serialization=False)
    refused(tmp_path / "old")
    (tmp_path / "old/pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    refused(tmp_path / "old")
    assert not canary.exists()
    torch.load(tmp_path / "m/pytorch_model.bin", weights_only=False)  # the bait is live
    assert canary.exists()


def test_bin_files_are_refused_by_versions_of_torch_that_could_run_their_code(tmp_path, monkeypatch):
    write_bin(tmp_path, {"w": torch.ones(2)})
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1+cpu"))
    assert refused(tmp_path).fix == "use torch >= 2.6"
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    open_model(tmp_path)


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        ({"state_dict": {"w": 3}}, "entry 'state_dict' is not a plain tensor"),
        ({"epoch": 3}, "entry 'epoch' is not a plain tensor"),
        ({1: torch.ones(2)}, "entry '1' is not a plain tensor"),
        ({"w": torch.eye(2).to_sparse()}, "entry 'w' is not a plain tensor"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "dtype torch.complex128 cannot be stored"),
        ({"__metadata__": torch.ones(2)}, "no tensor can be stored under the name '__metadata__'"),
    ],
)
def test_a_bin_file_that_is_no_state_dict_is_refused(tmp_path, loaded, message):
    assert message in refused(write_bin(tmp_path, loaded)).what


def test_a_damaged_bin_file_is_refused(tmp_path):
    path = write_bin(tmp_path, {"w": torch.ones(1000)}) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:2000])
    assert "cannot be loaded safely" in refused(tmp_path).what


def test_safetensors_is_preferred_to_bin(tmp_path):
    write_bin(tmp_path, {"w": torch.zeros(2)})
    write_model(tmp_path, {"w": torch.ones(2)})
    assert everything(open_model(tmp_path)) == stored({"w": torch.ones(2)})
