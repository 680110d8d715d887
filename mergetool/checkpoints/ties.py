"""Which names of a checkpoint are one tensor: tied heads, embeddings under several names, and copies of them.

What transformers ties is a table (`ties.yaml`); whether it does, config.json says, or the model type's own default.
A file may hold a tied tensor once, or again under its other name. If the copy differs, it is a tensor of its own after
all: transformers 5 then ties nothing, whatever config.json says (and earlier versions use the embeddings).
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from mergetool.errors import SourceError
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import ModelSource

TIE_KEY = "tie_word_embeddings"
_SAMPLE = 1 << 16
_NUM_SAMPLES = 16
_CHUNK = 1 << 24


@cache
def _table() -> dict[str, Any]:
    import yaml

    table: dict[str, Any] = yaml.safe_load((files("mergetool.checkpoints") / "ties.yaml").read_text("utf-8"))
    return table | {"untied": frozenset(table["untied"].split())}


def ties_words(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json has the output embeddings be the input embeddings; None without a model type to tell."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    told = next((part[TIE_KEY] for part in parts if part.get(TIE_KEY) is not None), None)
    if told is not None:
        return bool(told)
    return config["model_type"] not in _table()["untied"] if "model_type" in config else None


def may_be_tied(name: str) -> bool:
    """Whether a tensor of this name is a second name of another one in some network."""
    return _ends(name, _endings("heads", "always"))


def embeddings_of(names: Collection[str]) -> list[str]:
    """The input embeddings among these names, the one that heads are tied to first."""
    endings = _endings("embeddings")
    found = [name for name in names if _ends(name, endings)]
    return [name for ending in endings for name in found if _ends(name, ending)]


def is_head(name: str) -> bool:
    """Whether a tensor of this name is a matrix of output embeddings."""
    return _ends(name, _endings("heads"))


def twin_of(name: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> str | None:
    """The tensor of a checkpoint that `name` is a second name of; None if it is (or would be) a tensor of its own."""
    for alias, target in _table()["always"].items():
        if _ends(name, f".{alias}"):
            other = name.removesuffix(alias) + target
            return other if other in specs else None
    if not is_head(name) or not ties_words(config):
        return None
    shape = specs[name].shape if name in specs else None
    fitting = (other for other in embeddings_of(specs) if shape in (None, specs[other].shape) and other != name)
    return next(fitting, None)


def holds_the_same(source: ModelSource, name: str, other: str, *, whole: bool) -> bool:
    """Whether two tensors of a model are equal byte for byte; unless `whole`, by samples of them.

    A file that is not here yet is taken at its word (its config says that they are one).
    """
    spec, second = source.specs[name], source.specs[other]
    if (spec.shape, spec.dtype) != (second.shape, second.dtype):
        return False
    try:
        return all(
            _read(source, name, begin, length) == _read(source, other, begin, length)
            for begin, length in _pieces(spec.num_bytes, whole=whole)
        )
    except SourceError:
        return True


def _pieces(size: int, *, whole: bool) -> Sequence[tuple[int, int]]:
    """[begin, begin + length) of what is compared."""
    if whole or size <= _SAMPLE * _NUM_SAMPLES:
        return [(begin, min(_CHUNK, size - begin)) for begin in range(0, size, _CHUNK)]
    step = (size - _SAMPLE) // (_NUM_SAMPLES - 1)
    return [(place * step, _SAMPLE) for place in range(_NUM_SAMPLES)]


def _read(source: ModelSource, name: str, begin: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.read_bytes(name, begin, memoryview(buffer))
    return bytes(buffer)


@cache
def _endings(*kinds: str) -> tuple[str, ...]:
    return tuple(f".{ending}" for kind in kinds for ending in _table()[kind])


def _ends(name: str, endings: str | tuple[str, ...]) -> bool:
    return f".{name}".endswith(endings)
