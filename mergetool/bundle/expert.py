"""One compressed expert of a bundle, as a model like any other: base plus factors, rebuilt as it is read.

models: {sst2: {source: out/library, select: sst2}}       in a recipe of any method; passthrough writes it out

An expert that was a classifier of transformers is one again: its own head, names, config and tokenizer come with it.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mergetool.bundle.files import COMPARED, SPECTRA, spectrum_key, triplet_names, whole_name
from mergetool.bundle.manifest import ClassHead, Manifest, Task, read_manifest
from mergetool.bundle.masks import masked_change
from mergetool.bundle.verify import base_folder, check_base, check_files
from mergetool.checkpoints.view import RenamedModel
from mergetool.errors import SourceError
from mergetool.tensors.factors import Halves, KeptChange, nothing_added
from mergetool.tensors.folder import open_model
from mergetool.tensors.header import Header, TensorSpec
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import FileStamp, ModelSource, OpenFile, SafetensorsSource, read_header, read_whole


class ExpertSource(ModelSource):
    """A task's expert: names of the base, or of the expert's own class where the bundle keeps its head."""

    def __init__(self, base: ModelSource, manifest: Manifest, task: Task, folder: Path) -> None:
        """`folder`: that of the bundle."""
        self._base = base
        self._parameters = manifest.parameters
        self._place = manifest.names.index(task.name)
        self._bundle, self._factors, self._scale = folder, folder / task.factors, task.scale
        self._head = head = open_model(folder / task.head.file) if isinstance(task.head, ClassHead) else None
        self._names: Mapping[str, str] = {name: name for name in base.specs}
        self._last = threading.local()
        self.folder, self.stem = base.folder, base.stem
        if head is not None:
            assert isinstance(task.head, ClassHead)
            layout = manifest.layouts[task.head.layout]
            self._names = {own: name for own, name in layout.items() if own not in head.specs}
            self.folder = head.files[0].path.parent
        renamed = {own: replace(base.specs[name], name=own) for own, name in self._names.items()}
        self.specs: Mapping[str, TensorSpec] = renamed | ({} if head is None else dict(head.specs))

    @property
    def files(self) -> tuple[FileStamp, ...]:
        own = () if self._head is None else self._head.files
        return (*self._base.files, *own, FileStamp.of(self._factors))

    def position(self, name: str) -> tuple[int, int]:
        if name in self._names:
            return self._base.position(self._names[name])
        assert self._head is not None
        return len(self._base.files), self._head.position(name)[1]

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        if self._head is not None and name not in self._names:
            self._head.read_bytes(name, begin, buffer)
            return
        name = self._names[name]
        parameter = self._parameters.get(name)
        if parameter is None or parameter.policy == "skip":
            self._base.read_bytes(name, begin, buffer)
            return
        if getattr(self._last, "name", None) != name:  # one tensor is read in several slices, one after the other
            self._last.name, self._last.data = name, bytes_of(self._rebuilt(name).reshape(-1))
        buffer[:] = self._last.data[begin : begin + len(buffer)]

    def _rebuilt(self, name: str) -> Tensor:
        """Base + U diag(S) Vh (or the change kept in full), rounded once to the base's dtype."""
        spec = self._base.specs[name]
        stored = read_whole(self._base, name)
        values = stored.to(torch.float64)
        if self._parameters[name].policy == "mask":
            values += self._masked(name)
        elif self._parameters[name].policy == "full":
            values += read_whole(self._own, whole_name(name))
        elif triplet_names(name)[0] in self._own.specs:
            u, s, vh = (read_whole(self._own, part).to(torch.float64) for part in triplet_names(name))
            values += ((u * s) @ vh).view(spec.shape)
        return values.to(stored.dtype).contiguous()

    # ------------------------------------------------------------------ what was added to the base

    @cached_property
    def origin(self) -> ModelSource:
        plain = all(own == name for own, name in self._names.items()) and len(self._names) == len(self._base.specs)
        return self._base if plain else RenamedModel(self._base, self._names)

    def num_directions(self, name: str) -> int | None:
        parameter = self._parameters.get(self._names[name]) if name in self._names else None
        if name not in self._names or (parameter is not None and parameter.policy in ("full", "mask")):
            return None
        return parameter.ranks[self._place] if parameter is not None and parameter.ranks else 0

    def factors(self, name: str) -> Halves | None:
        """Kept as they are in the bundle, in float32, not rounded to the base's dtype."""
        if not (directions := self.num_directions(name)):
            return None if directions is None else nothing_added(self.specs[name].shape)
        u, s, vh = (read_whole(self._own, part).float() for part in triplet_names(self._names[name]))
        return u * s, vh

    def kept(self, name: str) -> KeptChange | None:
        if name not in self._names or self._is_masked(self._names[name]):
            return None
        name, specs = self._names[name], self._own.specs
        left, *_ = parts = triplet_names(name)
        directions = None if whole_name(name) in specs else specs[left].shape[1] if left in specs else 0

        def read() -> tuple[Tensor, ...]:
            if directions == 0:
                b, a = nothing_added(self._base.specs[name].shape)
                return b, torch.zeros(0), a
            return tuple(read_whole(self._own, part) for part in (parts if directions else (whole_name(name),)))

        return KeptChange(directions, read, lambda: self._spectrum(name), lambda: self._read(name))

    def _is_masked(self, name: str) -> bool:
        return name in self._parameters and self._parameters[name].policy == "mask"

    def _spectrum(self, name: str) -> Tensor:
        """The singular values that were there when it was decided how many to keep."""
        key, (_, own, _) = spectrum_key(self._place, name), triplet_names(name)
        if (spectra := self._all_spectra) is not None and key in spectra.specs:
            return read_whole(spectra, key)
        return read_whole(self._own, own) if own in self._own.specs else torch.zeros(0)

    def _read(self, name: str) -> tuple[Tensor, ...] | None:
        """What the bundle's router compares, where these are other directions than the expert keeps."""
        u, _, vh = triplet_names(spectrum_key(self._place, name))
        read = self._compared
        return None if read is None or u not in read.specs else (read_whole(read, u), read_whole(read, vh))

    @cached_property
    def _compared(self) -> ModelSource | None:
        return _of_all_experts(self._bundle / COMPARED)

    @cached_property
    def _own(self) -> ModelSource:
        """The file of factors."""
        return open_model(self._factors)

    @cached_property
    def _all_spectra(self) -> ModelSource | None:
        return _of_all_experts(self._bundle / SPECTRA)

    def _masked(self, name: str) -> Tensor:
        try:
            return masked_change(self._bundle, self._factors.relative_to(self._bundle), name, self._scale)
        except (OSError, SafetensorError) as error:
            what = f"cannot be read ({str(error)[:100]})"
            raise SourceError(what, str(self._factors), "make the bundle again") from None

    def close(self) -> None:
        for opened in ("_own", "_all_spectra", "_compared"):
            if (source := self.__dict__.pop(opened, None)) is not None:
                source.close()
        self._base.close()
        if self._head is not None:
            self._head.close()


def _of_all_experts(path: Path) -> ModelSource | None:
    """A file with something of every expert, if it is there."""
    if not path.is_file():
        return None
    stamp = FileStamp.of(path)
    return SafetensorsSource([path], None, elsewhere={path: OpenFile(stamp, _header(stamp))})


@lru_cache(maxsize=4)
def _header(stamp: FileStamp) -> Header:
    """It names tensors of all experts, and each of these asks for it."""
    return read_header(stamp.path)


def open_expert(folder: Path, task: str) -> ExpertSource:
    """One expert of a bundle. Raises SourceError for a task that it does not hold, and for a damaged bundle."""
    manifest = read_manifest(folder)
    if task not in manifest.names:
        raise SourceError(f"there is no task {task!r}", str(folder), f"its tasks are: {', '.join(manifest.names)}")
    check_files(folder, manifest, hashes=False)
    check_base(folder, manifest, hashes=manifest.base.kind == "reference")
    entry = next(entry for entry in manifest.tasks if entry.name == task)
    return ExpertSource(open_model(base_folder(folder, manifest)), manifest, entry, folder)
