"""What is no checkpoint is called what it is, and whoever does what the message says gets a model that is read."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from mergetool.errors import SourceError
from mergetool.planning.inspect import facts_about
from mergetool.tensors.folder import open_model
from tests.files import tensors, write_model
from tests.tensors.test_source import everything, refused, stored

STATE = tensors(0)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
PAGE = "<!DOCTYPE html>\n<html><body>Sign in</body></html>"


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if name.endswith(".json") else b"x" * 100)
    return folder


def named(error):
    """The place that a message says to name."""
    return Path(error.fix.rpartition(": ")[2])


def typed(error, start):
    """What the command in a message prints."""
    command = error.fix[error.fix.index(start) :]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["global_step5/mp_rank_00_model_states.pt", "zero_to_fp32.py", "latest", "config.json"], "DeepSpeed"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
        ([".metadata", "__0_0.distcp"], "torch.distributed.checkpoint"),
        (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"], "FSDP"),
        (["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"], "Megatron"),
        (["mp_rank_00/model_optim_rng.pt"], "Megatron"),
        (["model_optim_rng.pt"], "Megatron"),
        (["tf_model.h5", "config.json"], "TensorFlow"),
        (["model.ckpt.index", "model.ckpt.data-00000-of-00001", "checkpoint"], "TensorFlow 1"),
        (["flax_model.msgpack", "config.json"], "flax"),
        (["model-q4.gguf", "config.json"], "model-q4.gguf, which is a GGUF file"),
        (["model.onnx"], "model.onnx, which is an ONNX export"),
        (["weights.npz", "config.json"], "weights.npz, which holds arrays of numpy"),
        (["model.mlmodel"], "Core ML"),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"], "no weights"),
        ([], "is an empty folder"),
        (["params.json"], "params.json, but no weights"),
        (["config.json", "tokenizer.json"], "no model in this folder"),
    ],
)
def test_a_folder_without_weights_is_called_what_it_is(files, what, tmp_path):
    folder = touch(tmp_path, *files)
    error = refused(folder)
    assert what in error.what
    assert error.where == str(folder)
    with pytest.raises(SourceError, match=what.replace(".", r"\.")):
        facts_about(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_weights_beside_a_trainings_state_are_read(file, tmp_path):
    write_model(tmp_path, STATE, {})
    touch(tmp_path, "global_step5/x_model_states.pt", "zero_to_fp32.py", "optimizer.pt", "tf_model.h5", "m.gguf")
    assert everything(open_model(tmp_path)) == stored(STATE)


def test_of_a_trainings_checkpoints_the_newest_is_named(tmp_path):
    for step in (500, 1000, 90):
        write_model(tmp_path / f"checkpoint-{step}", tensors(step))
    error = refused(tmp_path)
    assert "3 checkpoints" in error.what
    assert everything(open_model(named(error))) == stored(tensors(1000))


def test_in_a_folder_of_the_hubs_cache_the_snapshot_is_named(tmp_path):
    repository = tmp_path / "models--org--name"
    for commit in ("abc", "def"):
        write_model(repository / "snapshots" / commit, tensors(len(commit)))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    for place in (repository, repository / "snapshots"):
        assert named(refused(place)) == repository / "snapshots/abc"
    shutil.rmtree(repository / "refs")
    assert everything(open_model(named(refused(repository)))) == stored(tensors(3))


def test_the_parts_of_a_pipeline_of_diffusers_are_named(tmp_path):
    for part, file in (("unet", "diffusion_pytorch_model.fp16"), ("vae", "diffusion_pytorch_model"), ("text", "model")):
        write_model(tmp_path / part, tensors(0), {}, file=f"{file}.safetensors")
    touch(tmp_path, "scheduler/scheduler_config.json")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    error = refused(tmp_path)
    assert error.what == "is a pipeline of diffusers; there are some in text, unet, vae"
    assert named(error) == tmp_path / "text"
    assert open_model(tmp_path / "unet").stem == "diffusion_pytorch_model"


def test_a_folder_whose_model_lies_one_deeper_names_it(tmp_path):
    write_model(tmp_path / "0_Transformer", STATE, {})
    touch(tmp_path, "modules.json", "1_Pooling/config.json")
    assert everything(open_model(named(refused(tmp_path)))) == stored(STATE)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_distributed_checkpoint_is_put_together_by_the_command(tmp_path):
    place = tmp_path / "my run"
    torch.distributed.checkpoint.save({"model": STATE, "step": 3}, checkpoint_id=place, no_dist=True)
    last = typed(refused(place), "python -m").splitlines()[-1]
    assert everything(open_model(Path(last.removeprefix("name ")))) == stored(STATE)


# -------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "what"), [(LFS, "a pointer of git LFS"), (PAGE, "a web page"), ("GGUF\x03", "a GGUF file")]
)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "m.pt", "config.json"]
)
def test_what_was_saved_in_a_files_place_is_recognised(file, content, what, tmp_path):
    if file == "config.json":
        write_model(tmp_path, STATE)
    (tmp_path / file).write_text(content)
    with pytest.raises(SourceError, match=what) as caught:
        facts_about(tmp_path)
    assert caught.value.where.endswith(str(tmp_path / file))
    assert caught.value.fix


def test_a_pointer_of_lfs_names_the_command_and_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_text(LFS)
    assert refused(tmp_path).fix == f"fetch it: git -C {tmp_path} lfs pull --include model.safetensors"


def test_arrays_of_numpy_are_converted_by_the_command(tmp_path):
    np.savez(tmp_path / "weights.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
    typed(refused(tmp_path), "python -c")
    assert everything(open_model(tmp_path)) == stored(STATE)
    assert "holds arrays of numpy" in refused(tmp_path / "weights.npz").what


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["my model.{}", "model.safetensors", "model.ckpt"])
def test_an_archive_is_unpacked_by_the_command(kind, name, tmp_path):
    save_file(STATE, tmp_path / "inside.safetensors")
    path = tmp_path / "archive" / name.format(kind)
    path.parent.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "inside.safetensors", "model.safetensors")
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "inside.safetensors", "model.safetensors")
    error = refused(path)
    assert f"is a {kind} archive" in error.what
    typed(error, "python -m")
    (unpacked,) = path.parent.glob("*.unpacked")
    assert everything(open_model(unpacked)) == stored(STATE)


@pytest.mark.parametrize(
    ("name", "what"),
    [("m.onnx", "ONNX"), ("m.h5", "TensorFlow"), ("m.msgpack", "flax"), ("m.gguf", "GGUF"), ("m.tflite", "Lite")],
)
def test_a_file_of_another_format_is_called_that(name, what, tmp_path):
    assert what in refused(touch(tmp_path, name) / name).what
