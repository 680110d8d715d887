"""Models in pickles: `.bin`, `.pt`, `.pth`, `.ckpt`. Weights only, memory-mapped where the format allows it.

No code is ever run: what is not a tensor or plain data is refused, with the command by which somebody who trusts the
file converts it. Old files (before torch 1.6) are no archives and are read into memory. A training's checkpoint holds
its model under some name beside epochs and optimizers: that is found, and told; where there are several, as with a
moving average beside the weights, only people can tell which is meant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from shlex import quote
from typing import TYPE_CHECKING, Any

from mergetool.errors import SourceError
from mergetool.tensors.foreign import disguised
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import FileStamp, MemorySource, ModelSource, check_complete

if TYPE_CHECKING:
    from torch import Tensor

_NESTS = ("state_dict", "model", "module", "model_state_dict", "net", "params", "ema")
_ASIDE = ("optim", "sched", "scaler", "amp", "rng", "callbacks", "loops", "config", "args", "hyper")
"""What names of entries beside a model begin with, or hold."""
_DEEPEST = 3
_PLAIN = (
    "import sys, torch; "
    "isd = lambda x: isinstance(x, dict) or hasattr(x, 'state_dict'); "
    "d = lambda x: x if isinstance(x, dict) else x.state_dict(); "
    "f = lambda x: {k: f(v) if isd(v) else v for k, v in d(x).items() if isd(v) or isinstance(v, torch.Tensor)}; "
    "torch.save(f(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), sys.argv[2])"
)
_TAKEN = (
    "import sys, torch; "
    "torch.save(torch.load(sys.argv[1], map_location='cpu', weights_only=True)[sys.argv[2]], sys.argv[3])"
)
_SCRIPT = "import sys, torch; torch.save(torch.jit.load(sys.argv[1], 'cpu').state_dict(), sys.argv[2])"


@dataclass
class PickledSource(ModelSource):
    """One or several pickles, their tensors memory-mapped."""

    folder: Path | None
    _stamps: tuple[FileStamp, ...]
    _tensors: MemorySource
    _file_of: Mapping[str, int]
    stem: str = "model"
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        folder: Path | None,
        weight_map: Mapping[str, str] | None = None,
        stem: str = "model",
        remarks: Sequence[str] = (),
    ) -> "PickledSource":
        """Open files; with `weight_map`, of every file only what the index says it holds. Raises SourceError."""
        tensors: dict[str, Tensor] = {}
        file_of = {}
        stamps, told = [], list(remarks)
        for index, path in enumerate(paths):
            stamps.append(FileStamp.of(path))
            loaded, remark = _load(path)
            told += [remark] if remark else []
            listed = {name: loaded[name] for name in loaded if weight_map is None or weight_map.get(name) == path.name}
            tensors.update(listed)
            file_of.update(dict.fromkeys(listed, index))
        check_complete(weight_map or {}, tensors, folder)
        where = str(folder or paths[0])
        return cls(folder, tuple(stamps), MemorySource(tensors, where), file_of, stem, tuple(told))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:  # type: ignore[override]
        return self._tensors.specs

    @property
    def files(self) -> tuple[FileStamp, ...]:
        return self._stamps

    def position(self, name: str) -> tuple[int, int]:
        return self._file_of[name], self._tensors.position(name)[1]

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        self._tensors.read_bytes(name, begin, buffer)


def _load(path: Path) -> tuple[dict[str, "Tensor"], str]:
    """The tensors of a file, and what is to be told about where in it they were."""
    tensors, under = _state_dict(_loaded(path), path)
    return tensors, f"{path.name} holds more than a model: the weights are those of {under!r}" if under else ""


def _loaded(path: Path) -> Any:
    """What `torch.load` makes of a file, if it does so without running any code."""
    import torch

    if torch.__version__ < "2.6":  # CVE-2025-32434: until then, weights_only did not keep all code out
        raise SourceError(f"torch {torch.__version__} cannot load .bin files safely", str(path), "use torch >= 2.6")
    try:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UnpicklingError:
        if (other := disguised(path)) is not None:
            raise other from None
        what = "is a pickle that holds more than tensors, and may hold code"
        raise SourceError(what, str(path), f"if you trust it, {_in_place(_PLAIN, path)}") from None
    except Exception as error:  # torch raises a dozen kinds here; none of them may reach the user raw
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SourceError:
    if (other := disguised(path)) is not None:
        return other
    if "torchscript" in str(error).lower():
        fix = f"take its weights out of it, if you trust it: {_in_place(_SCRIPT, path)}"
        return SourceError("is a TorchScript program, not a state dict", str(path), fix)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    fix = "the file is damaged or not a pickle of torch's; download or save it again"
    return SourceError(f"cannot be loaded safely: {first_line[:200]}", str(path), fix)


def _in_place(code: str, path: Path, *more: str) -> str:
    """A command that puts a file aside and what it holds in its place."""
    old, new = quote(f"{path}.original"), quote(str(path))
    return f"run: mv {new} {old} && python -c {quote(code)} {' '.join([old, *more, new])}"


def _state_dict(loaded: Any, path: Path, under: str = "") -> tuple[dict[str, "Tensor"], str]:
    """The entries that are a model's tensors, and the name under which they were found."""
    fix = "save the model's state_dict() alone, or convert it to safetensors"
    if not isinstance(loaded, Mapping):
        raise SourceError(f"holds a {type(loaded).__name__}, not a state dict", str(path), fix)
    strange = next((name for name, value in loaded.items() if not _is_entry(name, value)), None)
    if strange is None:
        return {name: value for name, value in loaded.items() if not name.endswith("_extra_state")}, under
    nests = _nests(loaded) if under.count(".") < _DEEPEST else []
    if len(nests) > 1:
        what = f"holds several sets of weights: {', '.join(map(repr, nests))}"
        chosen = quote(nests[0])
        raise SourceError(what, str(path), f"take one out of it, such as {nests[0]}; {_in_place(_TAKEN, path, chosen)}")
    if not nests:
        raise SourceError(f"entry {str(strange)[:80]!r} is not a plain tensor", str(path), fix)
    return _state_dict(loaded[nests[0]], path, f"{under}.{nests[0]}" if under else nests[0])


def _is_entry(name: Any, value: Any) -> bool:
    import torch

    if isinstance(name, str) and name.endswith("_extra_state"):  # of modules that keep more than tensors
        return True
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and plain


def _nests(loaded: Mapping[Any, Any]) -> list[str]:
    """Names of entries that can be a model's weights: those that usually are, and moving averages; else any others."""
    named = [name for name in loaded if isinstance(name, str) and _holds_tensors(loaded[name])]
    possible = [name for name in named if not any(part in name.lower() for part in _ASIDE)]
    usual = [name for name in possible if name in _NESTS or "ema" in name.lower()]
    return usual or possible


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    import torch

    if not isinstance(value, Mapping) or not value or depth > _DEEPEST:
        return False
    return any(isinstance(part, torch.Tensor) or _holds_tensors(part, depth + 1) for part in value.values())
