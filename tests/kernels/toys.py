"""Toy networks for the tests of alignment: spaces, layouts and random weights, no architecture files."""

import torch

from mergetool.kernels.matching import MatchingProblem
from mergetool.kernels.permute import Element
from mergetool.kernels.spaces import Factor, Space, length


def space_map(*spaces):
    return {space.name: space for space in spaces}


def axis(*segments, spaces):
    """A layout from segments of space names and fixed sizes; a name with a trailing '+' takes no signs."""
    return tuple(
        tuple(
            Factor(part)
            if isinstance(part, int)
            else Factor(spaces[part.rstrip("+")].size, part.rstrip("+"), not part.endswith("+"))
            for part in segment
        )
        for segment in segments
    )


def network(spaces, tensors):
    """`tensors`: name -> axes, each a list of segments. Returns (spaces, layouts)."""
    return spaces, {name: tuple(axis(*segments, spaces=spaces) for segments in axes) for name, axes in tensors.items()}


def mlp(*widths):
    names = [widths[0], *(f"h{k}" for k in range(len(widths) - 2)), widths[-1]]
    spaces = space_map(*(Space(f"h{k}", width) for k, width in enumerate(widths[1:-1])))
    tensors = {}
    for k in range(len(widths) - 1):
        tensors[f"w{k}"] = [[[names[k + 1]]], [[names[k]]]]
        if k < len(widths) - 2:
            tensors[f"b{k}"] = [[[names[k + 1]]]]
    return network(spaces, tensors)


def convnet():
    """Two convolutions and a dense layer behind a flatten, channels before pixels."""
    spaces = space_map(Space("a", 6), Space("b", 5), Space("c", 7))
    return network(
        spaces,
        {
            "conv1": [[["a"]], [[3]], [[3]], [[3]]],
            "conv2": [[["b"]], [["a"]], [[3]], [[3]]],
            "dense": [[["c"]], [["b", 4]]],
            "out": [[[4]], [["c"]]],
        },
    )


def vit():
    """One block with a fused qkv, LayerNorm's one common sign on the stream, and a (d, d) tensor."""
    spaces = space_map(
        Space("stream", 12, "flip"),
        Space("head", 3),
        Space("qk", 4, within="head"),
        Space("vo", 4, within="head"),
        Space("ffn", 14),
    )
    return network(
        spaces,
        {
            "embed": [[[20]], [["stream"]]],
            "norm.weight": [[["stream+"]]],
            "norm.bias": [[["stream"]]],
            "qkv.weight": [[["head", "qk"], ["head", "qk"], ["head", "vo"]], [["stream"]]],
            "qkv.bias": [[["head", "qk"], ["head", "qk"], ["head", "vo"]]],
            "proj": [[["stream"]], [["head", "vo"]]],
            "fc1": [[["ffn"]], [["stream"]]],
            "fc2": [[["stream"]], [["ffn"]]],
            "square": [[["stream"]], [["stream"]]],
            "out": [[[5]], [["stream"]]],
        },
    )


def llama():
    """One block: grouped-query attention under RoPE, signs on the stream, gate and up on one axis."""
    spaces = space_map(
        Space("stream", 10, "signed"),
        Space("kv", 2),
        Space("q", 3, within="kv"),
        Space("vo", 4, within="kv"),
        Space("ffn", 11),
    )
    return network(
        spaces,
        {
            "embed": [[[30]], [["stream"]]],
            "norm": [[["stream+"]]],
            "q": [[["kv", "q", 4]], [["stream"]]],
            "k": [[["kv", 4]], [["stream"]]],
            "v": [[["kv", "vo"]], [["stream"]]],
            "o": [[["stream"]], [["kv", "q", "vo"]]],
            "gate_up": [[[2, "ffn"]], [["stream"]]],
            "down": [[["stream"]], [["ffn"]]],
        },
    )


NETWORKS = {"mlp": lambda: mlp(6, 9, 8, 4), "convnet": convnet, "vit": vit, "llama": llama}


def weights(layouts, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([length(axis) for axis in axes], generator=generator, dtype=dtype)
        for name, axes in layouts.items()
    }


def planted(toy, num_models, seed, *, noise=0.0, dtype=torch.float64):
    """One network, noisy copies of it in random orders, and the elements (universe -> model) that made them."""
    spaces, layouts = toy
    generator = torch.Generator().manual_seed(seed)
    universe = weights(layouts, seed, dtype)
    elements = [Element.random(spaces, generator) for _ in range(num_models)]
    models = []
    for i, element in enumerate(elements):
        own = weights(layouts, 1000 * (seed + 1) + i, dtype)
        copy = {name: universe[name] + noise * own[name] for name in universe}
        models.append({name: element.apply(copy[name], layouts[name]) for name in copy})
    return universe, models, elements


def problem(toy, models, **options):
    return MatchingProblem.of(*toy, models=models, **options)


def to_universe(toy, models, elements):
    """The models' weights in the universe, for elements universe -> model."""
    _, layouts = toy
    return [
        {name: element.inverse().apply(tensor, layouts[name]) for name, tensor in model.items()}
        for model, element in zip(models, elements, strict=True)
    ]
