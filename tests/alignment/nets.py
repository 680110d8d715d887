"""Checkpoints in planted orders, for the tests of alignment: an MLP, a small ResNet, tiny transformers."""

import json

import torch
from safetensors.torch import save_file

from mergetool.arch.apply import transform
from mergetool.arch.match import resolve
from mergetool.kernels.permute import Element
from tests.arch.networks import MLP, ResNetCifar, randomised, transformer


def mlp(seed=0, widths=(6, 20, 16, 4)):
    return {name: x.clone() for name, x in randomised(MLP(widths), seed).state_dict().items()}


def resnet(seed=0):
    return {name: x.clone() for name, x in randomised(ResNetCifar("B"), seed).state_dict().items()}


def shapes_of(state):
    return {name: tuple(x.shape) for name, x in state.items() if x.is_floating_point()}


def shuffled(state, spec, seed):
    """The same network in another order; integers stay."""
    element = Element.random(spec.spaces, torch.Generator().manual_seed(seed))
    floats = {name: x for name, x in state.items() if x.is_floating_point()}
    return {**state, **transform(floats, spec, element)}


def noisy(state, seed, size):
    """`state` with noise of `size` standard deviations of each tensor; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, x in state.items():
        out[name] = x
        if x.is_floating_point():
            out[name] = x + size * x.std(correction=0) * torch.randn(x.shape, generator=generator)
        if name.endswith("running_var"):
            out[name] = out[name].abs()
    return out


def copies(state, num_models, *, architecture=None, config=None, noise=0.0):
    """`state` in as many random orders, each with noise of its own: models a, b, c, ..."""
    spec = resolve(architecture, shapes_of(state), config)
    return {"abcdefghij"[i]: shuffled(noisy(state, 100 + i, noise), spec, i) for i in range(num_models)}


def tiny_transformer(class_name, **changes):
    """(state dict, config, batch, module) of a tiny transformers model, tied tensors once."""
    module, batch = transformer(class_name, **changes)
    seen, state = set(), {}
    for name, x in module.state_dict().items():
        if x.data_ptr() not in seen:
            seen.add(x.data_ptr())
            state[name] = x.clone()
    return state, module.config.to_dict(), batch, module


def write(folder, models, config=None):
    """Save models as checkpoints folder/name; returns name -> path for a recipe."""
    for name, state in models.items():
        (folder / name).mkdir(parents=True)
        save_file({key: x.contiguous() for key, x in state.items()}, folder / name / "model.safetensors")
        if config is not None:
            (folder / name / "config.json").write_text(json.dumps(config))
    return {name: str(folder / name) for name in models}
