"""Classifier heads: read from files in the forms in which people have them, kept in one form in a bundle."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mergetool.bundle.files import TensorWriter, copy_files, small_files
from mergetool.bundle.manifest import ClassHead, Head, Pool
from mergetool.bundle.present import OwnHead
from mergetool.errors import PlanError, SourceError
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of
from mergetool.tensors.side_files import read_config
from mergetool.tensors.writer import write_tensors

_NAMES = ("classifier", "score", "classification_head.out_proj", "classifier.out_proj", "head", "fc")
"""What classifiers are called in transformers checkpoints (and timm), the most usual first."""


def read_head(path: Path, task: str) -> tuple[Tensor, Tensor]:
    """Weight (classes, features) and bias (classes,), float32, from a .safetensors file or a model folder.

    The file holds `weight` and perhaps `bias`, or is a checkpoint with a classifier inside. Raises SourceError.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    where = f"head of task {task!r}: {file}"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot be read ({str(error)[:100]})", where, "name a .safetensors file") from None
    prefix = next((name for name in ("", *_NAMES) if _key(name, "weight") in tensors), None)
    if prefix is None:
        fix = "save it with keys weight and bias"
        raise SourceError(
            f"holds neither `weight` nor a classifier (it holds {', '.join(list(tensors)[:5])})", where, fix
        )
    weight = tensors[_key(prefix, "weight")].float()
    bias = tensors.get(_key(prefix, "bias"))
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"weight {list(weight.shape)}" + (f", bias {list(bias.shape)}" if bias is not None else "")
        raise SourceError(f"{shapes}: expected (classes, features) and (classes,)", where, "save it in that shape")
    return weight, torch.zeros(len(weight)) if bias is None else bias.float()


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def write_head(
    task: str,
    path: Path,
    folder: Path,
    width: int | None,
    pool: Pool,
    normalize: bool,
    labels: tuple[str, ...],
) -> Head:
    """Copy a head into a bundle. Raises PlanError where it does not fit the base or its labels."""
    weight, bias = read_head(path, task)
    where = f"head of task {task!r}"
    if width is not None and weight.shape[1] != width:
        what = f"reads {weight.shape[1]} features, the base has {width}"
        raise PlanError(what, where, "give the head that was trained on this base")
    if labels and len(labels) != len(weight):
        raise PlanError(f"{len(labels)} labels for {len(weight)} classes", where, "give one label per class")
    name = f"heads/{quote(task, safe='')}.safetensors"
    (folder / "heads").mkdir(exist_ok=True)
    write_tensors(folder / name, {"weight": weight, "bias": bias})
    return Head(file=name, num_classes=len(weight), pool=pool, normalize=normalize, labels=labels or _labels(path))


def write_class_head(task: str, head: OwnHead, folder: Path, layout: int) -> ClassHead:
    """Copy what is an expert's own into a bundle, as it is stored, with config and tokenizer."""
    place = f"heads/{quote(task, safe='')}"
    specs = [head.source.specs[name] for name in head.names]
    with TensorWriter(folder, f"{place}/head.safetensors", specs) as writer:
        for spec in specs:
            stored = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            head.source.read_bytes(spec.name, 0, bytes_of(stored.reshape(-1)))
            writer.put(spec.name, stored)
    copy_files(small_files(head.folder), folder / place)
    labels = () if head.kind == "span" else _labels(head.folder) or ("LABEL_0", "LABEL_1")  # transformers' own default
    return ClassHead(
        file=f"{place}/head.safetensors",
        architecture=head.architecture,
        kind=head.kind,
        layout=layout,
        num_classes=len(labels) or 2,
        labels=labels,
        problem=read_config(head.folder).get("problem_type"),
    )


def hidden_size(config: Mapping[str, object]) -> int | None:
    """How many features a base has by its config."""
    for key in ("hidden_size", "d_model"):
        if isinstance(value := config.get(key), int):
            return value
    return None


def _labels(path: Path) -> tuple[str, ...]:
    """Class names from `id2label` of the checkpoint's config, if there are any."""
    names = read_config(path).get("id2label") if path.is_dir() else None
    return tuple(str(names[key]) for key in sorted(names, key=int)) if isinstance(names, dict) else ()
