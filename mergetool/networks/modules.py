"""The modules of a network without its weights: which parameter each tensor of a checkpoint is, and of what layer."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from torch import nn

from mergetool.checkpoints.adapters.forms import InMemory
from mergetool.checkpoints.adapters.places import TASK_HEADS, leaf_of
from mergetool.errors import PlanError
from mergetool.networks.library import BUILDING, class_of, first_line, library, module_of_library, quiet
from mergetool.tensors.header import TensorSpec


def parts_of(names: Collection[str], config: Mapping[str, Any], where: str) -> dict[str, InMemory]:
    """What every tensor of a checkpoint is in the network that config.json names; nothing of one that it does not have.

    Raises SourceError or PlanError where transformers cannot build the network.
    """
    network = _empty(config, where)
    shared: dict[int, list[str]] = {}
    owner: dict[str, tuple[str, nn.Module]] = {}
    for name, module, parameter in _parameters(network):
        shared.setdefault(id(parameter), []).append(name)
        owner[name] = (name.rpartition(".")[0], module)
    known = {name: names for names in shared.values() for name in names}
    parts = {}
    for stored, name in in_memory(names, network).items():
        if name in known:
            first, *_ = several = (name, *(other for other in known[name] if other != name))
            parts[stored] = _part(several, *owner[first], network)
    return parts


Kind = Literal["linear", "turned", "vector"]
"""What the weight of a layer is: (outputs, inputs), (inputs, outputs), or one number for each channel."""
BY_CODE = "built by"
"""In place of a config: the function that builds a plain module."""
_BY_RANK: Mapping[int, Kind] = {1: "vector", 2: "linear"}


def kind_of(module: nn.Module) -> Kind | None:
    """What the weight of a module is, if the module is a layer of channels."""
    if isinstance(module, module_of_library("pytorch_utils").Conv1D):
        return "turned"
    if isinstance(module, nn.Linear):
        return "linear"
    return "vector" if getattr(getattr(module, "weight", None), "ndim", 0) == 1 else None


def linears_of(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str, fix: str) -> dict[str, bool]:
    """The weights of linear layers among the tensors of a checkpoint, and whether each is stored as (inputs, outputs).

    Not what several modules share. Raises SourceError or PlanError where transformers cannot build the network.
    """
    kinds = layers_of(specs, config, where, fix)
    return {name: kind == "turned" for name, kind in kinds.items() if kind != "vector"}


def layers_of(specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str, fix: str) -> dict[str, Kind]:
    """The weights of layers among the tensors of a checkpoint. Not what several modules share.

    Of a plain module, which is not built before a run: all that may be some by its shape.
    Raises SourceError or PlanError where transformers cannot build the network.
    """
    if BY_CODE in config:
        ranks = {name: len(spec.shape) for name, spec in specs.items() if spec.dtype.is_float}
        return {name: _BY_RANK[rank] for name, rank in ranks.items() if name.endswith("weight") and rank in _BY_RANK}
    network = _empty(config, where, "measuring", fix)
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module, parameter in _parameters(network):
        owners.setdefault(id(parameter), []).append((name, module))
    alone = {each[0][0]: each[0][1] for each in owners.values() if len(each) == 1}
    inside = {name: inner for name, inner in in_memory(specs, network).items() if inner.endswith(".weight")}
    kinds = {name: kind_of(alone[inner]) for name, inner in inside.items() if inner in alone}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _empty(
    config: Mapping[str, Any], where: str, what_for: str = "making an adapter", fix: str = "write kind: checkpoint"
) -> Any:
    library(what_for, where, PlanError)
    from accelerate import init_empty_weights

    kind = class_of(config, where)
    try:
        with BUILDING, quiet(), init_empty_weights(include_buffers=False):
            network = kind._from_config(kind.config_class.from_dict(dict(config)))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        what = f"transformers cannot build it: {first_line(error)}"
        raise PlanError(what, where, fix) from error
    network.tie_weights()
    return network


def _parameters(network: nn.Module) -> Iterator[tuple[str, nn.Module, object]]:
    """Parameters and buffers under every name that a module which PEFT sees has for them."""
    for path, module in network.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        yield from ((f"{path}.{name}".lstrip("."), module, each) for name, each in own)


def _part(names: tuple[str, ...], module: str, kind: nn.Module, network: Any) -> InMemory:
    turned = isinstance(kind, module_of_library("pytorch_utils").Conv1D)
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    plain = turned or isinstance(kind, nn.Linear) or (isinstance(kind, nn.Conv2d) and kind.groups == 1)
    apart = kind is output or leaf_of(module) in TASK_HEADS or len(names) > 1
    layer = plain and not apart and names[0].endswith(".weight")
    return InMemory(names, layer, turned)


def in_memory(names: Collection[str], network: Any) -> dict[str, str]:
    """What the network calls the tensors of a file, as transformers loads it; not those that it puts together."""
    mapping, loading = module_of_library("conversion_mapping"), module_of_library("core_model_loading")
    if mapping is None or loading is None:  # before transformers 5
        return {name: name for name in names}
    every = mapping.get_model_conversion_mapping(network)
    renamings = [each for each in every if isinstance(each, loading.WeightRenaming)]
    others = [each for each in every if not isinstance(each, loading.WeightRenaming)]
    state, prefix = network.state_dict(), network.base_model_prefix
    told = {name: loading.rename_source_key(name, renamings, others, prefix, state) for name in names}
    return {name: renamed for name, (renamed, merged) in told.items() if merged is None}
