"""What is no checkpoint that can be merged, named for what it is, with what to do about it.

    disguised(path)    a file that is not what its name says: a pointer of git LFS, a web page, an archive
    foreign_file(path) a file of another format
    foreign_folder(..) a folder without weights to read: a training's state, another framework's model, a parent folder

All is told from names and first bytes. Commands that are named have been tried, where what they need is to be had.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from shlex import quote
from zipfile import BadZipFile, ZipFile

from mergetool.errors import SourceError
from mergetool.tensors.sets import chosen_set, weight_sets

_FIRST_BYTES = 512
_PICKLED = ("data.pkl", "constants.pkl")
_NPZ = (
    "import sys, numpy, torch; from safetensors.torch import save_file; "
    "save_file({k: torch.from_numpy(v) for k, v in numpy.load(sys.argv[1]).items()}, sys.argv[2])"
)
_OF_TENSORFLOW = "convert it with an older transformers (below 5, with tensorflow installed): "
_OF_FLAX = "convert it with an older transformers (below 5, with flax installed): "
_ORIGIN = "get the checkpoint that it was made from"


def disguised(path: Path) -> SourceError | None:
    """What a file really is that should hold weights or JSON; None where nothing of this kind is known."""
    try:
        with path.open("rb") as file:
            first = file.read(_FIRST_BYTES)
    except OSError:
        return None
    refusal = _by_first_bytes(first, path)
    return SourceError(refusal[0], str(path), refusal[1]) if refusal else None


def _by_first_bytes(first: bytes, path: Path) -> tuple[str, str] | None:
    if first.startswith(b"version https://git-lfs"):
        fix = f"fetch it: git -C {quote(str(path.parent))} lfs pull --include {quote(path.name)}"
        return "is a pointer of git LFS, not the file itself", fix
    if re.match(rb"\s*(<!doctype html|<html|<\?xml)", first, re.IGNORECASE):
        return "is a web page, not the file itself", f"download it again: hf download ORG/NAME {quote(path.name)}"
    if first.startswith(b"GGUF"):
        return _gguf(path)
    if first.startswith(b"\x89HDF"):
        return "is an HDF5 file, of Keras or TensorFlow", _OF_TENSORFLOW + _loads(path, "from_tf=True")
    if first.startswith(b"PK\x03\x04") and (inside := _zipped(path)):
        if all(name.endswith(".npy") for name in inside):
            return _npz(path)
        return "is a zip archive", f"unpack it: python -m zipfile -e {_unpacked(path)}"
    if first.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or first[257:262] == b"ustar":
        return "is a tar archive, or compressed", f"unpack it: python -m tarfile -e {_unpacked(path)}"
    return None


def _zipped(path: Path) -> list[str]:
    """What a zip archive holds; nothing where it is one of torch's, or damaged."""
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, BadZipFile):
        return []
    return [] if any(name.endswith(_PICKLED) for name in names) else names


def foreign_file(path: Path) -> SourceError:
    """What a file is that no weights are read from, by its content and its name."""
    fix = "name a .safetensors file or a model folder"
    by_name = {
        ".onnx": ("is an ONNX export of a network, which does not go back into a model", _ORIGIN),
        ".mlmodel": ("is a Core ML export of a network, which does not go back into a model", _ORIGIN),
        ".tflite": ("is a TensorFlow Lite export of a network, which does not go back into a model", _ORIGIN),
        ".msgpack": ("is a model of flax", _OF_FLAX + _loads(path, "from_flax=True")),
        ".h5": ("is a model of Keras or TensorFlow", _OF_TENSORFLOW + _loads(path, "from_tf=True")),
        ".npz": _npz(path),
        ".gguf": _gguf(path),
        ".distcp": ("is a part of a distributed checkpoint", f"name its folder, for the command: {path.parent}"),
    }
    if (other := disguised(path)) is not None:
        return other
    what = f"{path.suffix or 'this'} is not a file type that can be merged"
    named, told = by_name.get(path.suffix, (what, fix)) if not _is_torch(path) else (what, fix)
    return SourceError(named, str(path), told)


def foreign_folder(path: Path, files: Collection[str], folders: Collection[str]) -> SourceError | None:
    """What a folder without weights of its own is; None where nothing is known of what lies there."""
    for what, fix in _folder_kinds(path, set(files), set(folders)):
        return SourceError(what, str(path), fix)
    return None


def _folder_kinds(path: Path, files: set[str], folders: set[str]) -> Iterator[tuple[str, str]]:
    """All that may be said of a folder, what says most first."""
    if not files and not folders:
        yield "is an empty folder", "name the folder that holds the weights"
    yield from _trained(path, files, folders)
    yield from _made_elsewhere(path, files)
    yield from _parents(path, folders)
    if any(re.match(r"optimizer|scheduler|training_args|trainer_state|rng_state", name) for name in files):
        yield "holds the state of a training, but no weights", "name the folder that the model was saved in"
    if "params.json" in files:
        yield "holds a model's params.json, but no weights", "get consolidated.safetensors or consolidated.*.pth, too"


def _trained(path: Path, files: set[str], folders: set[str]) -> Iterator[tuple[str, str]]:
    steps = [name for name in folders if re.fullmatch(r"global_step\d+", name)]
    here, above = quote(str(path)), quote(str(path.parent))
    if "zero_to_fp32.py" in files or steps:
        fix = f"put its weights together, then name the new folder: {_zero(here)}"
        yield "is a checkpoint of DeepSpeed, its weights split over processes", fix
    if any(re.match(r"(bf16_)?zero_pp_rank_|mp_rank_\d+_model_states", name) for name in files):
        fix = f"put its weights together, then name the new folder: {_zero(above)}"
        yield "is one step of a checkpoint of DeepSpeed, its weights split over processes", fix
    if ".metadata" in files or any(name.endswith(".distcp") for name in files):
        one = quote(f"{path}.pt")
        fix = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {here} {one} && echo name {one}"
        yield "is a distributed checkpoint (FSDP, torch.distributed.checkpoint)", f"put it together: {fix}"
    parts = sorted(name for name in folders if re.fullmatch(r"pytorch_model_fsdp_\d+|distcp|dcp", name))
    if parts:
        yield "is a checkpoint of FSDP", f"name the folder of its weights: {path / parts[0]}"
    if "latest_checkpointed_iteration.txt" in files or any(re.fullmatch(r"mp_rank_\d+(_\d+)?", n) for n in folders):
        yield _MEGATRON
    if any(re.fullmatch(r"model_optim_rng\.pt|model_rng\.pt|distrib_optim\.pt", name) for name in files):
        yield _MEGATRON


_MEGATRON = (
    "is a checkpoint of Megatron-LM",
    "convert it to transformers' format first, with the converter of what trained it (tools/checkpoint/convert.py)",
)


def _zero(folder: str) -> str:
    return f"cd {folder} && python zero_to_fp32.py . merged --safe_serialization"


def _made_elsewhere(path: Path, files: set[str]) -> Iterator[tuple[str, str]]:
    if any(re.fullmatch(r"flax_model.*\.msgpack", name) for name in files):
        yield "holds a model of flax", _OF_FLAX + _loads(path, "from_flax=True")
    if any(re.fullmatch(r"tf_model.*\.h5", name) for name in files):
        yield "holds a model of TensorFlow", _OF_TENSORFLOW + _loads(path, "from_tf=True")
    if any(re.fullmatch(r".*\.ckpt\.index|checkpoint", name) for name in files):
        yield "holds a checkpoint of TensorFlow 1", _OF_TENSORFLOW + _loads(path, "from_tf=True")
    for ending in (".gguf", ".npz", ".onnx", ".mlmodel", ".tflite", ".msgpack", ".h5"):
        for name in sorted(name for name in files if name.endswith(ending)):
            error = foreign_file(path / name)
            yield f"holds {name}, which {error.what}", error.fix


def _parents(path: Path, folders: set[str]) -> Iterator[tuple[str, str]]:
    steps = {int(match.group(1)): name for name in folders if (match := re.fullmatch(r"checkpoint-(\d+)", name))}
    if steps:
        newest = steps[max(steps)]
        yield f"holds {len(steps)} checkpoints of a training", f"name one of them, such as the newest: {path / newest}"
    if {"snapshots", "refs"} & folders and path.name.startswith(("models--", "datasets--")):
        yield "is a folder of the Hub's cache", f"name a snapshot in it: {_snapshot(path)}"
    if path.name == "snapshots" and path.parent.name.startswith("models--"):
        yield "is a folder of the Hub's cache", f"name a snapshot in it: {_snapshot(path.parent)}"
    inside = sorted(name for name in folders if _has_weights(path / name))
    if inside:
        kind = "is a pipeline of diffusers" if (path / "model_index.json").is_file() else "holds no weights itself"
        yield f"{kind}; there are some in {', '.join(inside)}", f"name what is to be merged: {path / inside[0]}"


def _snapshot(path: Path) -> Path:
    """The snapshot of the branch main, or else the newest."""
    main = path / "refs" / "main"
    if main.is_file() and (path / "snapshots" / main.read_text().strip()).is_dir():
        return path / "snapshots" / main.read_text().strip()
    snapshots = sorted((path / "snapshots").glob("*"), key=lambda snapshot: snapshot.stat().st_mtime)
    return snapshots[-1] if snapshots else path / "snapshots"


def _has_weights(folder: Path) -> bool:
    try:
        names = {path.name for path in folder.iterdir()}
        return bool(weight_sets(names)) or chosen_set(names, str(folder)) is not None
    except (OSError, SourceError):
        return False


def _is_torch(path: Path) -> bool:
    """Whether a file is an archive of torch's, whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04" and disguised(path) is None
    except OSError:
        return False


def _gguf(path: Path) -> tuple[str, str]:
    new = path.with_suffix("")
    load = f"AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r})"
    code = f"from transformers import AutoModelForCausalLM; {load}.save_pretrained({str(new)!r})"
    return "is a GGUF file of llama.cpp", f"convert it (pip install gguf), then name {new}: python -c {quote(code)}"


def _npz(path: Path) -> tuple[str, str]:
    new = quote(str(path.with_suffix(".safetensors")))
    return "holds arrays of numpy (MLX, JAX)", f"convert it: python -c {quote(_NPZ)} {quote(str(path))} {new}"


def _loads(path: Path, option: str) -> str:
    folder = str(path if path.is_dir() else path.parent)
    load = f"AutoModel.from_pretrained({folder!r}, {option})"
    return f"python -c {quote(f'from transformers import AutoModel; {load}.save_pretrained({folder!r})')}"


def _unpacked(path: Path) -> str:
    return f"{quote(str(path))} {quote(str(path.with_suffix('')) + '.unpacked')}"
