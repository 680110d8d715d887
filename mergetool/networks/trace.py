"""`architecture: auto` for a checkpoint of transformers: build the class that config.json names, trace it, prove it.

The module is built at its real size in float32 and proved in float64, which takes about 30 bytes of memory per
parameter: meant for networks of up to a billion parameters. Larger ones need a file.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mergetool.arch import match
from mergetool.arch.bind import Shapes, architectures
from mergetool.arch.spec import ArchSpec, renamed
from mergetool.errors import PlanError
from mergetool.networks.batch import small_batch
from mergetool.networks.library import first_line, library
from mergetool.networks.places import model_of_marks, whole_of

_WHERE = "architecture auto"
_FIX = (
    "name a function that builds the network, `architecture: FILE.py:FUNCTION` (with --trust-code), or a file that "
    "mergetool.derive_architecture wrote"
)


def resolve(architecture: str | None, shapes: Shapes, config: Mapping[str, Any]) -> ArchSpec:
    """`arch.match.resolve`, and "auto": the network that config.json names, built and traced. Raises PlanError."""
    return derive_from_config(shapes, config) if architecture == "auto" else match.resolve(architecture, shapes, config)


def derive_from_config(shapes: Shapes, config: Mapping[str, Any]) -> ArchSpec:
    """The proved spec of the network that config.json describes, for the tensors that the checkpoint stores.

    Raises PlanError if the network cannot be built or cannot be traced.
    """
    from mergetool.arch.trace import derive

    module, names = network_of(shapes, config)
    return renamed(derive(module, **small_batch(module)), names)


def prove_for_config(spec: ArchSpec, shapes: Shapes, config: Mapping[str, Any]) -> float:
    """The largest relative change of an output of the network that config.json describes, under elements of `spec`.

    Raises PlanError naming the tensor and axis at fault if that is more than rounding, or if there is no such network.
    """
    from mergetool.arch.verify import general_position, prove, runner

    module, names = network_of(shapes, config)
    inside = {own: spec.tensors[name] for own, name in names.items() if name in spec.tensors}
    return prove(runner(module, **small_batch(module)), general_position(module), replace(spec, tensors=inside))


def network_of(shapes: Shapes, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, str]]:
    """The network that config.json describes, and for each of its tensors that the checkpoint stores the name there.

    Its weights mean nothing. Raises PlanError if transformers is missing or does not know the network, or if the
    module has no place for a tensor.
    """
    transformers = library("building the network", _WHERE, PlanError)
    named = [name for name in architectures(config) if hasattr(transformers, name)]
    if not named:
        what = "config.json names no network that transformers knows" if config else "there is no config.json"
        raise PlanError(what, where=_WHERE, fix=_FIX)
    return _built(getattr(transformers, named[0]), shapes, config)


def _built(kind: Any, shapes: Shapes, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, str]]:
    """The module, and for each tensor of the module that the file stores its name in the file."""
    settings = kind.config_class.from_dict({**config, "use_cache": False, "dtype": "float32", "torch_dtype": "float32"})
    try:
        module = model_of_marks(kind, settings, shapes)
    except (RuntimeError, ValueError) as error:
        what = f"the checkpoint does not fit {kind.__name__}: {first_line(error)}"
        raise PlanError(what, where=_WHERE, fix=_FIX) from error
    state = module.state_dict()
    names = {own: name for own, tensor in state.items() if (name := whole_of(shapes, tensor)) is not None}
    if lost := [name for name in sorted(shapes) if shapes[name] and name not in names.values()]:
        raise PlanError(f"{kind.__name__} has no place for {lost[0]}", where=_WHERE, fix=_FIX)
    return module, names
