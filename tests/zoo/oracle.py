"""What a merge should compute: modules that transformers loaded, merged naively in float64, and their logits.

Nothing of mergetool is used here. Tensors have the names of the loaded module, whatever the files call them; a tensor
that a file lacks (transformers starts it at random) takes no part.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logging.disable_progress_bar()
State = dict[str, torch.Tensor]
Rule = Callable[[State | None, Sequence[State]], State]
Rename = Callable[[str], str]
TOLERANCE = 1e-4


def opened(folder: Path, model: type) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder in float64, and what transformers says about its keys."""
    plain = {"experts_implementation": "eager"} if _has_experts(folder) else {}
    module, info = model.from_pretrained(folder, output_loading_info=True, dtype=torch.float64, **plain)
    return module.eval(), info


def state_of(folder: Path, model: type, rename: Rename = str) -> State:
    """The tensors that the files hold, under the names of the module (changed by `rename`)."""
    module, info = opened(folder, model)
    absent = set(info["missing_keys"])
    return {rename(name): value for name, value in module.state_dict().items() if name not in absent}


def linear(base: State | None, models: Sequence[State]) -> State:
    """The mean of those that have a tensor."""
    return _each(models, lambda name, found: sum(found) / len(found))


def task_arithmetic(scale: float = 0.5) -> Rule:
    """`base + scale * sum(x - base)`; what the base lacks comes from the first that has it."""

    def rule(base: State | None, models: Sequence[State]) -> State:
        assert base is not None

        def merge(name: str, found: list[torch.Tensor]) -> torch.Tensor:
            origin = base.get(name)
            if origin is None:
                return found[0]
            return origin + scale * sum(value - origin for value in found)

        return base | _each(models, merge)

    return rule


def _each(models: Sequence[State], merge: Callable[[str, list[torch.Tensor]], torch.Tensor]) -> State:
    names = dict.fromkeys(name for model in models for name in model)
    merged = {}
    for name in names:
        found = [model[name] for model in models if name in model]
        merged[name] = merge(name, found) if found[0].is_floating_point() else found[0]
    return merged


def expected_logits(
    base: State | None, models: Sequence[State], rule: Rule, inputs: Mapping[str, torch.Tensor], like: nn.Module
) -> torch.Tensor:
    """Logits of the merge, computed by a module of the class and config of `like`."""
    state = rule(base, models)
    module = _fresh(like, state)
    absent, _ = module.load_state_dict(state, strict=False)
    assert not absent, f"the oracle has no value for {absent}"
    return logits(module, inputs)


def _fresh(like: nn.Module, state: State) -> nn.Module:
    """A module like `like`, with ties only where the merged tensors are equal."""
    module = copy.deepcopy(like).double().eval()
    for name, value in module.named_parameters(remove_duplicate=False):
        if name in state and value.shape != state[name].shape:
            raise AssertionError(f"{name}: config.json says {list(value.shape)}, merged {list(state[name].shape)}")
    _untie(module, state)
    return module


def _untie(module: nn.Module, state: State) -> None:
    """Give every parameter that shares memory with another of a different value memory of its own."""
    first: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(value), name)
        if name in state and other in state and not torch.equal(state[name], state[other]):
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value.detach().clone()))


def logits(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a model answers, as one row of float64 numbers."""
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        out = module(**wide)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(f"no logits among {list(out)}")


def _has_experts(folder: Path) -> bool:
    text = (folder / "config.json").read_text()
    return "num_experts" in text or "num_local_experts" in text
