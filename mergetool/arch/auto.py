"""`architecture: auto` for a checkpoint of transformers: build the class that config.json names, trace it, prove it.

The module is built at its real size in float32 and proved in float64, which takes about 30 bytes of memory per
parameter: meant for networks of up to a billion parameters. Larger ones need a file.

Files do not always use the names of the module (transformers renames while loading). Which name goes where is found by
loading a stand-in: a state dict in which every tensor is filled with a number of its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergetool.arch.bind import Shapes, architectures
from mergetool.arch.spec import ArchSpec
from mergetool.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

_FIX = (
    "name a function that builds the network, `architecture: FILE.py:FUNCTION` (with --trust-code), or a file that "
    "mergetool.derive_architecture wrote"
)
_IMAGE_SIZE = 64  # for networks that take images of any size


def derive_from_config(shapes: Shapes, config: Mapping[str, Any]) -> ArchSpec:
    """The proved spec of the network that config.json describes, for the tensors that the checkpoint stores.

    Raises PlanError if the network cannot be built or cannot be traced.
    """
    from mergetool.arch.trace import derive

    module, names = network_of(shapes, config)
    return renamed(derive(module, **_batch(module)), names)


def prove_for_config(spec: ArchSpec, shapes: Shapes, config: Mapping[str, Any]) -> float:
    """The largest relative change of an output of the network that config.json describes, under elements of `spec`.

    Raises PlanError naming the tensor and axis at fault if that is more than rounding, or if there is no such network.
    """
    from mergetool.arch.verify import general_position, prove, runner

    module, names = network_of(shapes, config)
    inside = {own: spec.tensors[name] for own, name in names.items() if name in spec.tensors}
    return prove(runner(module, **_batch(module)), general_position(module), replace(spec, tensors=inside))


def network_of(shapes: Shapes, config: Mapping[str, Any]) -> tuple["nn.Module", dict[str, str]]:
    """The network that config.json describes, and for each of its tensors that the checkpoint stores the name there.

    Its weights mean nothing. Raises PlanError if transformers is missing or does not know the network, or if the
    module has no place for a tensor.
    """
    try:
        import transformers
    except ImportError:
        what = "the network is built with transformers, which is not installed"
        raise PlanError(what, where="architecture auto", fix="pip install transformers") from None
    named = [name for name in architectures(config) if hasattr(transformers, name)]
    if not named:
        what = "config.json names no network that transformers knows" if config else "there is no config.json"
        raise PlanError(what, where="architecture auto", fix=_FIX)
    return _load(getattr(transformers, named[0]), shapes, config)


def _load(model_class: Any, shapes: Shapes, config: Mapping[str, Any]) -> tuple["nn.Module", dict[str, str]]:
    """The module, and for each tensor of the module that the file stores its name in the file."""
    import torch

    stored = sorted(shapes)
    # Numbers that no initialisation writes.
    numbered = {name: torch.full(shapes[name], number + 0.25) for number, name in enumerate(stored)}
    settings = {**config, "use_cache": False, "dtype": "float32", "torch_dtype": "float32"}
    try:
        module = model_class.from_pretrained(
            None, config=model_class.config_class.from_dict(settings), state_dict=numbered
        )
    except (RuntimeError, ValueError) as error:
        what = f"the checkpoint does not fit {model_class.__name__}: {str(error).splitlines()[0]}"
        raise PlanError(what, where="architecture auto", fix=_FIX) from error
    names = {}
    for name, tensor in module.state_dict().items():
        number = float(tensor.reshape(-1)[0]) if tensor.numel() else 0.0
        if number > 0 and number % 1 == 0.25 and bool((tensor == number).all()):
            names[name] = stored[int(number)]
    lost = [name for name in stored if name not in names.values() and shapes[name]]
    if lost:
        raise PlanError(f"{model_class.__name__} has no place for {lost[0]}", where="architecture auto", fix=_FIX)
    return module, names


def _batch(module: Any) -> dict[str, Any]:
    """One small batch of the kind of input that the module names as its main one."""
    import torch

    if module.main_input_name != "pixel_values":
        return dict(module.dummy_inputs)
    size = getattr(module.config, "image_size", _IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.rand(1, module.config.num_channels, height, width)}


def renamed(spec: ArchSpec, names: Mapping[str, str]) -> ArchSpec:
    """The spec of the file: its names, and of several names of one tensor those that it stores."""
    in_file = {names[name]: tensor for name, tensor in spec.tensors.items() if name in names}
    tied = []
    for group in spec.tied:
        stored = tuple(dict.fromkeys(names[name] for name in group if name in names))
        in_file |= {name: replace(in_file[name], matched=k == 0) for k, name in enumerate(stored)}
        tied += [stored] if len(stored) > 1 else []
    return replace(spec, tensors=in_file, tied=tuple(tied))
