"""A model that runs, out of whatever its weights are read from, and what a checkpoint calls its parts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergetool.checkpoints.view import RenamedModel
from mergetool.errors import PlanError, SourceError
from mergetool.networks.kept import Keeping, KeptInMemory
from mergetool.networks.library import BUILDING, class_of, first_line, library, quiet
from mergetool.networks.modules import kind_of
from mergetool.networks.places import TensorMap, places_of, tensors_of
from mergetool.networks.spread import Spread, input_device, is_offloaded
from mergetool.networks.ways import Parts, Take, Way, WayBack, run_back
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource, SafetensorsSource

WHOLE = "save the model whole, with save_pretrained, and its config.json beside it"


@dataclass(frozen=True)
class RunningNetwork:
    """A model of transformers, ready to run, and the names of its tensors in the checkpoint."""

    model: Any
    places: TensorMap
    shapes: Mapping[str, tuple[int, ...]]
    where: str
    """What messages call it."""

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        found: torch.dtype = self.model.dtype
        return found

    def linears(self) -> dict[str, nn.Module]:
        """The linear layers by what the checkpoint calls their weights."""
        return {name: each for name, each in self.layers().items() if kind_of(each) != "vector"}

    def layers(self) -> dict[str, nn.Module]:
        """Linear layers and norms by what the checkpoint calls their weights."""
        modules = {f"{path}.weight": each for path, each in self.model.named_modules() if kind_of(each) is not None}
        return {self.places.names[name]: each for name, each in modules.items() if name in self.places.names}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What can be trained, each once, by its name in memory. Raises PlanError where some of it is elsewhere."""
        if is_offloaded(self.model):
            what = "is dealt out over memory or the disk, and gradients need all of it on devices"
            raise PlanError(what, self.where, "leave --device-map out, or take a method without gradients: regmean")
        return dict(self.model.named_parameters())

    def stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of parameters, by their names in memory, under all names that the checkpoint has for them."""
        every = tensors_of(self.model)
        alike = {id(every[name]): value for name, value in values.items()}
        found: dict[str, Tensor] = {}
        for name, tensor in every.items():
            if (value := alike.get(id(tensor))) is not None:
                found |= dict(self._parts(name, value))
        return found

    def ways(self, inputs: Sequence[Mapping[str, Tensor]]) -> Iterator[Way]:
        """What runs at once, in order. Each way wants all inputs to be run before the next one."""
        yield Way(0, 1, lambda _: True, lambda place: self.model(**inputs[place]))

    def ways_back(self, inputs: Sequence[Mapping[str, Tensor]], parts: Parts) -> Iterator[WayBack]:
        """The parameters whose gradients are there at once. Raises PlanError where there can be none."""
        parameters = self.parameters()

        def run(place: int, take: Take) -> None:
            found = parts(place, self.model(**inputs[place]))
            for number, (share, value) in enumerate(found, 1):
                run_back([(value, None)], parameters, (), partial(take, share), more=number < len(found))

        yield WayBack(0, 1, parameters, run)

    def keeping(self) -> Keeping:
        """Where tensors wait that are found on the way."""
        return KeptInMemory()

    def finishing(self) -> AbstractContextManager[object]:
        """What is measured inside is stored before the end; then what was kept on the way is of no use."""
        return nullcontext()

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set tensors, by their names in the checkpoint. What the network does not have is passed over."""
        with torch.no_grad():
            for name, tensor in tensors_of(self.model).items():
                if (stored := values.get(self.places.names.get(name, ""))) is not None:
                    tensor.copy_(stored.view(tensor.shape))
                for part in self.places.fragments.get(name, ()):
                    if part.name in values:
                        part.put(tensor, values[part.name].to(tensor.device))

    def _parts(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint that a parameter is, or is made of where it holds whole ones."""
        if name in self.places.names:
            stored = self.places.names[name]
            yield stored, value.view(self.shapes[stored])
            return
        for part in self.places.fragments.get(name, ()):
            box = part.of(value).reshape(-1)
            if box.numel() == torch.Size(self.shapes[part.name]).numel():
                held = box if part.order is None else torch.empty_like(box).scatter_(0, part.order.to(box.device), box)
                yield part.name, held.view(self.shapes[part.name])


def load_network(
    source: ModelSource, dtype: torch.dtype, device: torch.device, where: str, spread: Spread | None = None
) -> RunningNetwork:
    """The network of a model's own class, its weights read from `source`; on a device, or dealt out.

    Raises SourceError.
    """
    assert source.folder is not None
    kind, told = class_of(read_config(source.folder), where), dict[str, Any]()
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    try:
        with BUILDING, quiet():
            config = config_to_run(source.folder, where)
            load = partial(_load, kind, told, config=config, dtype=dtype)
            if spread is not None and _is_folder(source):
                model = spread.opened(partial(load, source.folder, local_files_only=True))
            else:
                model = load(None, state_dict={name: read_tensor(source, name) for name in source.specs})
    except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise SourceError(f"transformers cannot open it: {first_line(error)}", where, WHOLE) from error
    if missing := sorted(told["missing_keys"]):
        what = f"{len(missing)} tensors of {kind.__name__} are not in the model: {missing[0]}"
        raise SourceError(what, where, WHOLE)
    if spread is None:
        model.to(device)
    elif not _is_folder(source):
        spread.dealt(model)
    return RunningNetwork(model.eval(), places_of(model, shapes), shapes, where)


def _load(kind: Any, told: dict[str, Any], folder: Path | None, **more: Any) -> Any:
    """A model, and beside it what transformers tells of how it was loaded."""
    model, found = kind.from_pretrained(folder, output_loading_info=True, **more)
    told.update(found)
    return model


def _is_folder(source: ModelSource) -> bool:
    """Whether a model is what lies in its folder, and transformers can read it there."""
    plain = source.model if isinstance(source, RenamedModel) else source
    return isinstance(plain, SafetensorsSource) and all(each.path.parent == source.folder for each in plain.files)


def config_to_run(folder: Path, where: str) -> Any:
    """The config of a network that is fed with plain weights and answers once."""
    config = library("measuring", where).AutoConfig.from_pretrained(folder)
    config.use_cache = False  # nothing here is generated
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights come as plain numbers
    return config


def read_tensor(source: ModelSource, name: str) -> Tensor:
    """One tensor, whole, in the dtype in which it is stored."""
    spec = source.specs[name]
    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    source.read_bytes(name, 0, bytes_of(tensor.reshape(-1)))
    return tensor


def whole_config(source: ModelSource, where: str) -> dict[str, Any]:
    """All of a model's config, with what config.json leaves to defaults. Raises PlanError where there is none."""
    fix = (
        "save the model with save_pretrained, which writes config.json beside the weights; a module of your own: write "
        "architecture: FILE.py:FUNCTION (for regmean and esm), or `measured` in `calibration`"
    )
    if source.folder is None or not read_config(source.folder):
        raise PlanError("has no config.json, so it cannot be run on data", where, fix)
    try:
        with quiet():
            config = library("measuring", where, PlanError).AutoConfig.from_pretrained(source.folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise PlanError(f"transformers cannot read its config.json: {first_line(error)}", where, fix) from error
    known = {key: value for key, value in read_config(source.folder).items() if key == "architectures"}
    return {**config.to_dict(), **known}
