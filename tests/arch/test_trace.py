"""Traced specs agree with those written by hand, and what cannot be traced is fixed, never wrong."""

import logging
from dataclasses import replace
from io import StringIO

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergetool.arch.match import resolve
from mergetool.arch.trace import derive, proved, traced
from mergetool.arch.verify import failures, prove, runner
from mergetool.errors import PlanError
from mergetool.kernels.spaces import Factor, Space, ancestors
from tests.arch.networks import (
    MLP,
    ResNetCifar,
    ResNetTorchvision,
    TimmViT,
    randomised,
    transformer,
    vgg,
)
from tests.files import LONG


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def places(spec):
    """The permutations of a spec without names: where each space is met, and within what. Signs are left aside."""
    met = spec.incidences(matched=False)

    def where(name):
        return frozenset((p.tensor, p.axis, p.start, p.outer, p.size, p.inner) for p in met[name])

    def moves(name):
        return spec.spaces[name].symmetry != "fixed" and spec.spaces[name].size > 1

    return {
        where(name): tuple(where(outer) for outer in ancestors(spec.spaces, name) if moves(outer))
        for name in spec.spaces
        if moves(name)
    }


MODULES = {
    "mlp": (MLP, "mlp", normal(3, 6), {}),
    "mlp-norm": (lambda: MLP(norm=True), "mlp", normal(3, 6), {}),
    "vgg": (vgg, "vgg", normal(2, 3, 4, 4), {}),
    "resnet-option-a": (lambda: ResNetCifar(blocks=1), None, normal(2, 3, 8, 8), {}),
    "resnet-option-b": (lambda: ResNetCifar("B"), None, normal(2, 3, 8, 8), {}),
    "resnet-bottleneck": (lambda: ResNetTorchvision(bottleneck=True), None, normal(2, 3, 32, 32), {}),
    "timm-vit": (lambda: TimmViT(depth=1), None, normal(2, 3, 8, 8), {"num_heads": 3}),
}

TRANSFORMERS = {
    "vit": ("ViTForImageClassification", "sdpa", {}),
    "bert": ("BertForSequenceClassification", "eager", {}),
    "bert-masked": ("BertForMaskedLM", "sdpa", {}),
    "gpt2": ("GPT2LMHeadModel", "eager", {}),
    "llama": ("LlamaForCausalLM", "eager", {}),
    "llama-one-kv-head": ("LlamaForCausalLM", "sdpa", {"num_key_value_heads": 1}),
    "llama-no-groups": ("LlamaForCausalLM", "sdpa", {"num_attention_heads": 3}),
    "qwen2-tied": ("Qwen2ForCausalLM", "sdpa", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "eager", {}),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_traced_module_has_the_spaces_of_its_family_file(case):
    make, architecture, inputs, config = MODULES[case]
    module = randomised(make())
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert places(derive(module, inputs)) == places(resolve(architecture, shapes, config))


@pytest.mark.parametrize("case", TRANSFORMERS if LONG else ["vit", "bert", "gpt2", "llama-one-kv-head", "mistral"])
def test_a_traced_transformer_has_the_spaces_of_its_family_file(case):
    name, attention, changes = TRANSFORMERS[case]
    model, batch = transformer(name, **changes)
    model.config._attn_implementation = attention
    if "ViT" not in name and "Bert" not in name:
        batch["use_cache"] = False
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    by_hand = resolve(None, shapes, model.config.to_dict())
    spec = derive(model, **batch)
    assert places(spec) == places(by_hand)
    assert [*map(sorted, spec.tied)] == [*map(sorted, by_hand.tied)]


class Encoder(nn.Module):
    """torch's own encoder layer: queries, keys and values in one matrix, heads cut out by views."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 4)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)

    def forward(self, x):
        return self.last(self.layer(self.first(x)).mean(1))


def test_the_attention_of_torch_is_heads_with_channels_within():
    spec = derive(randomised(Encoder()), normal(2, 6, 5))
    kinds = {(group.kind, group.size, tuple(space.size for space in group.spaces[1:])) for group in spec.groups}
    assert kinds == {("nested", 3, (4, 4)), ("permutation", 12, ()), ("permutation", 20, ())}


class Dense(nn.Module):
    """Features of all layers side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.last = nn.Linear(15, 3)

    def forward(self, x):
        a = self.a(x)
        b = torch.cat([a, self.b(a.relu())], 1)
        c = torch.cat([b, self.c(self.norm(b).relu())], 1)
        return self.last(c.mean((2, 3)))


def test_concatenated_features_keep_their_own_spaces():
    spec = derive(randomised(Dense()), normal(2, 3, 6, 6))
    assert sorted(group.size for group in spec.groups) == [4, 5, 6]
    assert [segment[0].size for segment in spec.tensors["last.weight"].axes[1]] == [4, 6, 5]
    assert not spec.tensors["norm.running_mean"].matched


def test_depthwise_convolutions_and_group_norms_are_understood():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.PReLU(8),
        nn.Conv2d(8, 12, 1),
        nn.GroupNorm(3, 12),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    spec = derive(randomised(net), normal(2, 3, 6, 6))
    found = {
        (group.size, tuple((space.size, space.within is not None) for space in group.spaces[1:]))
        for group in spec.groups
    }
    assert found == {(8, ()), (3, ((4, True),))}


class SharedGain(nn.Module):
    """Attention whose queries and keys are scaled by one gain over the channels, the same for every head."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.first(x)
        q, k, v = (f(x).view(*x.shape[:2], 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q * self.gain, k, v)
        return self.last(x + self.o(y.transpose(1, 2).reshape(x.shape)))


def test_channels_that_meet_a_gain_without_heads_are_shared_by_all_heads():
    spec = derive(randomised(SharedGain()), normal(2, 6, 5))
    within = {space.name: space.within for space in spec.spaces.values() if space.size == 4}
    assert sorted(outer is not None for outer in within.values()) == [False, True]
    assert spec.tensors["gain"].axes[0][0][0].space in within


class FusedGain(nn.Module):
    """Queries, keys and values in one tensor, scaled by one gain before they part."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 4)
        self.qkv, self.gain = nn.Linear(12, 36), nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        fused = self.qkv(self.first(x)).view(*x.shape[:2], 3, 3, 4) * self.gain
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        return self.last(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_what_is_used_before_a_fused_tensor_parts_is_shared_by_its_parts():
    module, inputs = randomised(FusedGain()), normal(2, 6, 5)
    spec = traced(module, inputs)
    assert sorted(space.size for space in spec.spaces.values()) == [3, 4, 12]
    assert failures(runner(module, inputs), module.state_dict(), spec) == ()


class Squeeze(nn.Module):
    """Every head is scaled by what all heads have in common, channel by channel; no parameter sees that."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 4)

    def forward(self, x):
        heads = self.first(x).view(-1, 3, 4)
        return self.last((heads * heads.mean(1, keepdim=True)).flatten(1))


def test_channels_that_meet_without_heads_in_the_graph_alone_are_shared_too():
    module, inputs = randomised(Squeeze()), normal(7, 5)
    spec = traced(module, inputs)
    # The heads may even be permuted channel by channel, but not the channels head by head.
    assert {(space.size, space.within is not None) for space in spec.spaces.values()} == {(3, True), (4, False)}
    assert failures(runner(module, inputs), module.state_dict(), spec) == ()


def test_units_that_are_only_summed_have_nothing_to_undo_their_moves():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x):
            return functional.relu(self.a(x)).sum(1)

    assert derive(randomised(Pooled()), normal(3, 4)).groups == ()


@pytest.fixture
def said():
    """What a trace says, details too."""
    logger, told = logging.getLogger("mergetool.arch"), StringIO()
    handler = logging.StreamHandler(told)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield told
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


class Odd(nn.Module):
    """An operation in the middle that no rule knows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(functional.relu(self.b(torch.cummax(self.a(x), 1).values)))


def test_what_is_not_understood_stays_fixed_and_the_rest_moves(said):
    spec = derive(randomised(Odd()), normal(3, 4))
    assert [group.name for group in spec.groups] == ["b.weight[0]"]
    assert "no rule for cummax" in said.getvalue()


def test_a_parameter_that_is_not_used_does_not_move():
    module = MLP()
    module.spare = nn.Linear(7, 7)
    spec = derive(randomised(module), normal(3, 6))
    assert all("spare" not in place.tensor for met in spec.incidences(matched=False).values() for place in met)


def test_a_group_that_fails_the_proof_is_fixed_and_said_so(said):
    module, inputs = MLP(), normal(3, 6)
    nn.init.zeros_(module.layers[3].bias)
    spec = traced(module, inputs)
    # Staging that the classes' biases may be permuted too, which does not show as long as they are 0.
    bias = replace(spec.tensors["layers.3.bias"], axes=(((Factor(4, "classes"),),),))
    wrong = replace(
        spec,
        spaces={**spec.spaces, "classes": Space("classes", 4)},
        tensors={**spec.tensors, "layers.3.bias": bias},
    )
    assert failures(runner(module, inputs), module.state_dict(), wrong) == ()
    mended = proved(wrong, module, inputs)
    assert mended.spaces["classes"].symmetry == "fixed"
    assert [group.name for group in mended.groups] == [group.name for group in spec.groups]
    assert "classes is no symmetry as traced; it stays fixed" in said.getvalue()
    assert prove(runner(module, inputs), module.state_dict(), mended) < 1e-10


def test_channels_that_do_not_nest_are_permuted_as_a_whole(said):
    module, inputs = randomised(SharedGain()), normal(2, 6, 5)
    spec = traced(module, inputs)
    gain = spec.tensors["gain"]
    shared = gain.axes[0][0][0].space
    heads = next(space.name for space in spec.spaces.values() if space.size == 3)
    # Staging that the gain need not follow, so that queries and keys could be shuffled head by head.
    wrong = replace(
        spec,
        spaces={**spec.spaces, shared: replace(spec.spaces[shared], within=heads)},
        tensors={**spec.tensors, "gain": replace(gain, axes=(((replace(gain.axes[0][0][0], space=None),),),))},
    )
    mended = proved(wrong, module, inputs)
    assert "its parts are taken apart" in said.getvalue()
    assert mended.spaces[shared].symmetry == "fixed"
    assert mended.spaces[heads].symmetry == "permutation"


def test_tracing_twice_gives_the_same_spec():
    first, again = (traced(randomised(TimmViT()), normal(2, 3, 8, 8)) for _ in range(2))
    assert first.digest() == again.digest()
    assert list(first.spaces) == list(again.spaces)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_control_flow_that_depends_on_data_is_refused():
    with pytest.raises(PlanError, match="the module cannot be traced") as caught:
        derive(Branching(), normal(3, 4))
    assert "architecture file" in caught.value.fix
