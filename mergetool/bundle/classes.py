"""Experts of a class of transformers with heads of their own: one network for all, and what each of them reads in it.

The network is the class itself, with the base's weights; one pass gives every sample the weights of its own group of
tasks (see `mergetool.bundle.grouped`). Then each task's own class answers its samples (see `mergetool.bundle.replay`).
Tasks whose classes or configs differ by more than their labels have networks of their own, which share their weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergetool.bundle.answer import Scored
from mergetool.bundle.arrow import Mix
from mergetool.bundle.batch import take
from mergetool.bundle.factors import Group, TaskFactors
from mergetool.bundle.files import read_all
from mergetool.bundle.grouped import GroupedModel, Runs, SeveralGroups
from mergetool.bundle.manifest import ClassHead, HeadKind, Manifest
from mergetool.bundle.replay import Playback, Player, Recorder, Said, rows_of, set_part, shared_parts
from mergetool.errors import SourceError
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

if TYPE_CHECKING:
    from mergetool.networks.build import LoadedModel

_UNUSED = ("labels", "start_positions", "end_positions", "next_sentence_label")
"""Inputs for training."""
_OF_LABELS = (
    *("architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
)
"""What configs of experts may differ in while their networks are the same."""


@dataclass(frozen=True)
class _Own:
    """A task's head, as it lies in the bundle."""

    task: int
    head: ClassHead
    folder: Path
    tensors: Mapping[str, Tensor]

    @property
    def network(self) -> tuple[str, int, tuple[str, ...], str]:
        """What tasks have in common that read one network."""
        config = {key: value for key, value in read_config(self.folder).items() if key not in _OF_LABELS}
        same = json.dumps(config, sort_keys=True)
        return self.head.architecture, self.head.layout, tuple(sorted(self.tensors)), same


class ClassNetwork(nn.Module):
    """One network, and the tasks that read it."""

    def __init__(
        self, loaded: "LoadedModel", layout: Mapping[str, str], owns: Sequence[_Own], factors: TaskFactors
    ) -> None:
        """`layout`: names in the base by name in the expert."""
        super().__init__()
        self.base = loaded.model
        self.names = {name: layout[own] for name, own in loaded.places.names.items() if own in layout}
        own = {name: stored for name, stored in loaded.places.names.items() if stored in owns[0].tensors}
        shared = shared_parts(loaded.model, own)
        fragments = {
            name: tuple(replace(fragment, name=layout[fragment.name]) for fragment in parts)
            for name, parts in loaded.places.fragments.items()
            if all(fragment.name in layout for fragment in parts)
        }
        self.grouped = GroupedModel(loaded.model, self.names, factors, fragments, set(layout.values()))
        self._recorder = Recorder(loaded.model, shared, [name for name, stored in own.items() if stored not in layout])
        self._player = Player()
        self.readers = nn.ModuleDict({str(each.task): _reader(each, loaded, shared, self._player) for each in owns})
        self._kinds: dict[int, HeadKind] = {each.task: each.head.kind for each in owns}

    def scores(self, groups: Sequence[Group], inputs: Mapping[str, Any], mix: Mix | None = None) -> dict[int, Scored]:
        """What every task of this network says of the samples in whose group it is.

        With `mix`, the network has shares of all experts for them, and not the weights of their groups.
        """
        inputs = {key: value for key, value in inputs.items() if key not in _UNUSED}
        try:
            return self._scores(groups, inputs, mix)
        except SeveralGroups:
            self.grouped.mixable = False
            return self._scores(groups, inputs, mix)

    def _scores(self, groups: Sequence[Group], inputs: Mapping[str, Any], mix: Mix | None) -> dict[int, Scored]:
        samples = [sample for sample, group in enumerate(groups) if self._kinds.keys() & set(group)]
        scored: dict[int, list[Scored]] = {}
        for part in self._parts(samples, groups) if mix is None else [samples] if samples else []:
            batch, runs = take(inputs, part), _runs(part, groups, mix)
            with self.grouped.using(runs):
                said = self._recorder.record(partial(self.base, **batch))
            for task in self._kinds:
                if rows := [row for row, sample in enumerate(part) if task in groups[sample]]:
                    own = _runs([part[row] for row in rows], groups, mix)
                    values = self._read(task, rows_of(said, rows, len(part)), own, take(batch, rows))
                    scored.setdefault(task, []).append(Scored([part[row] for row in rows], values))
        return {task: Scored.joined(parts) for task, parts in scored.items()}

    def _parts(self, samples: Sequence[int], groups: Sequence[Group]) -> list[list[int]]:
        """The samples as they can be run together, sorted by group."""
        ordered = sorted(samples, key=lambda sample: groups[sample])
        if self.grouped.mixable:
            return [ordered] if ordered else []
        distinct = sorted({groups[sample] for sample in ordered})
        return [[sample for sample in ordered if groups[sample] == group] for group in distinct]

    def _read(self, task: int, said: Said, runs: Runs, inputs: Mapping[str, Any]) -> Tensor:
        """(samples, classes), (samples, tokens, classes), or (samples, tokens, start and end)."""
        with self.grouped.using(runs), self._player.playing(said):
            output = self.readers[str(task)](**inputs)
        if self._kinds[task] == "span":
            return torch.stack([output.start_logits, output.end_logits], -1).float()
        logits: Tensor = output.logits
        return logits.float()


def _runs(samples: Sequence[int], groups: Sequence[Group], mix: Mix | None) -> Runs:
    """How these samples are run together."""
    if mix is not None:
        return Runs.mixed(mix.take(samples), len(samples))
    return Runs.of([groups[sample] for sample in samples])


def load_networks(
    manifest: Manifest, folder: Path, base: Path, factors: TaskFactors, dtype: torch.dtype
) -> list[ClassNetwork]:
    """The networks of all tasks with heads of their own class. Raises SourceError."""
    owns: dict[Any, list[_Own]] = {}
    for place, task in enumerate(manifest.tasks):
        if isinstance(task.head, ClassHead):
            file = folder / task.head.file
            own = _Own(place, task.head, file.parent, read_all(file))
            owns.setdefault(own.network, []).append(own)
    if not owns:
        return []
    weights, shared = open_model(base), dict[str, nn.Parameter]()
    return [_network(manifest, same, weights, factors, dtype, shared) for same in owns.values()]


def _network(
    manifest: Manifest,
    owns: Sequence[_Own],
    base: ModelSource,
    factors: TaskFactors,
    dtype: torch.dtype,
    shared: dict[str, nn.Parameter],
) -> ClassNetwork:
    """The network of some tasks. What `shared` holds of the base already is taken from there."""
    from mergetool.networks.build import class_in, load_class

    layout = manifest.layouts[owns[0].head.layout]
    kind, config = class_in(owns[0].folder, owns[0].head.architecture)
    tensors = {own: _read(base, name) for own, name in layout.items()}
    loaded = load_class(kind, config, {**tensors, **owns[0].tensors}, dtype, str(owns[0].folder))
    names = {name: layout[own] for name, own in loaded.places.names.items() if own in layout}
    for path, module in loaded.model.named_modules():
        for key, value in module._parameters.items():
            if value is not None and (name := names.get(f"{path}.{key}".lstrip("."))) is not None:
                module._parameters[key] = shared.setdefault(name, value)
    return ClassNetwork(loaded, layout, owns, factors)


def _reader(own: _Own, network: "LoadedModel", shared: Sequence[str], player: Player) -> nn.Module:
    """A task's class with its own tensors, in which all other parts play back."""
    from mergetool.networks.build import class_in, empty_model

    kind, config = class_in(own.folder, own.head.architecture)
    model: nn.Module = empty_model(kind, network.model, config)
    for path in shared:
        set_part(model, path, Playback(path, player, network.model.get_submodule(path)))
    for path, module in model.named_modules():
        for key in [key for key, value in module._parameters.items() if value is not None]:
            name = f"{path}.{key}".lstrip(".")
            stored = own.tensors.get(network.places.names.get(name, ""))
            if stored is None:
                raise SourceError(f"the head lacks {name}", str(own.folder), "make the bundle again")
            like = network.model.get_parameter(name)
            module._parameters[key] = nn.Parameter(stored.to(like), requires_grad=False)
        for key in [key for key, value in module._buffers.items() if value is not None]:
            name = f"{path}.{key}".lstrip(".")
            stored = own.tensors.get(network.places.names.get(name, ""), network.model.get_buffer(name))
            module._buffers[key] = stored
    return model


def _read(source: ModelSource, name: str) -> Tensor:
    stored = torch.empty(source.specs[name].shape, dtype=torch_dtype(source.specs[name].dtype))
    source.read_bytes(name, 0, bytes_of(stored.reshape(-1)))
    return stored


def stored_dtype(base: Path) -> torch.dtype:
    """The dtype that most of a checkpoint's numbers are stored in."""
    specs = [spec for spec in open_model(base).specs.values() if spec.dtype.is_float]
    return torch_dtype(max(specs, key=lambda spec: spec.num_elements).dtype)
