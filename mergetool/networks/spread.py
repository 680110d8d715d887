"""Networks that do not fit a device: accelerate deals their layers over devices, memory and the disk.

What is not on the device comes there when it is needed, layer by layer, and goes again: answers are the same, later.
"""

import json
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergetool.errors import PlanError

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Spread:
    """How a network is dealt over what there is: a strategy of accelerate's, or devices by module.

    `memory`: most bytes of it that stay in memory; None for as many as fit. Raises PlanError for an unknown strategy.
    """

    device_map: str | Mapping[str, str | int] = "auto"
    memory: int | None = None
    one_device: bool = False
    """Whether there must be no second device."""

    def __post_init__(self) -> None:
        if isinstance(self.device_map, str) and self.device_map not in STRATEGIES:
            what = f"{self.device_map!r} is none of {', '.join(STRATEGIES)}"
            raise PlanError(what, "--device-map", "use --device-map auto")

    def limits(self) -> dict[Any, Any]:
        """Bytes by device, memory under "cpu"; what is left goes to the disk."""
        from accelerate.utils import get_max_memory

        limits = dict(get_max_memory())
        if self.one_device:
            limits = {device: most for device, most in limits.items() if device in (0, "mps", "cpu")}
        return limits if self.memory is None else {**limits, "cpu": self.memory}

    def opened(self, load: Callable[..., Any]) -> Any:
        """What `load` opens when it is given these arguments of `from_pretrained`.

        Files of safetensors are read where they lie; the folder is for what cannot be.
        """
        folder = mkdtemp(prefix="mergetool-")
        chosen, limits = self.device_map, {"max_memory": self.limits()}
        if not isinstance(chosen, str):
            chosen, limits = dict(chosen), {}
        with _quiet():
            model = load(device_map=chosen, offload_folder=folder, **limits)
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        return model

    def dealt(self, model: Any) -> dict[str, Tensor]:
        """Deal out a model that is in memory. Its tensors where they are kept: what is written there takes effect."""
        from accelerate import dispatch_model

        folder, before = Path(mkdtemp(prefix="mergetool-")), dict(model.state_dict())
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        devices, skipped = self._devices(model), getattr(model, "_skip_keys_device_placement", None)
        if "" in devices:  # the whole model, of which accelerate writes nothing to the disk
            devices = {name: devices[""] for name, _ in model.named_children()}
        with _quiet():
            dispatch_model(model, devices, offload_dir=folder, skip_keys=skipped)
        return _kept(model, before, folder)

    def _devices(self, model: Any) -> dict[str, Any]:
        """Devices by module."""
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        if not isinstance(self.device_map, str):
            return dict(self.device_map)
        whole, limits = list(getattr(model, "_no_split_modules", None) or ()), self.limits()
        if self.device_map != "sequential":
            low = self.device_map == "balanced_low_0"
            limits = get_balanced_memory(model, limits, no_split_module_classes=whole, low_zero=low)
        devices: dict[str, Any] = infer_auto_device_map(model, limits, no_split_module_classes=whole)
        return devices


@contextmanager
def _quiet() -> Iterator[None]:
    """accelerate tells what was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _kept(model: nn.Module, before: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Where each tensor is: on its device, in memory, or in a file that is mapped. Tied ones become one file."""
    index = json.loads((folder / "index.json").read_text()) if (folder / "index.json").is_file() else {}
    kept: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        original = first.setdefault(before[name].data_ptr(), name)
        if tensor.device.type != "meta":
            kept[name] = tensor
        elif name not in index:
            kept[name] = before[name]
        elif original != name and original in index:
            (folder / f"{name}.dat").unlink()
            (folder / f"{name}.dat").hardlink_to(folder / f"{original}.dat")
            kept[name] = kept[original]
        else:
            kept[name] = _mapped(folder / f"{name}.dat", before[name])
    return kept


def _mapped(path: Path, like: Tensor) -> Tensor:
    """The file of an offloaded tensor, as that tensor: bytes are as they are in memory."""
    held = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+"))
    return held[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of a model's tensors are not there until they are needed."""
    return any(parameter.is_meta for parameter in model.parameters())


def forward_key(module: nn.Module) -> str:
    """The attribute of a module that holds how it runs, once its tensors are there."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def fetched(module: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """A tensor of a module, brought from where it is kept if it is not there."""
    hook: Any = getattr(module, "_hf_hook", None)
    if not tensor.is_meta or hook is None:
        return tensor
    hook = next(each for each in getattr(hook, "hooks", [hook]) if getattr(each, "weights_map", None) is not None)
    value: Tensor = hook.weights_map[key]
    return value.to(hook.execution_device, tensor.dtype)
