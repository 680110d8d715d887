import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.arch.apply import transform, transform_tensor
from mergetool.arch.match import resolve
from mergetool.errors import PlanError
from mergetool.kernels.permute import Element
from tests.arch.networks import ResNetCifar, randomised, transformer


@pytest.fixture(scope="module")
def llama():
    model, _ = transformer("LlamaForCausalLM", tie_word_embeddings=True)
    weights = model.state_dict()
    return weights, resolve(None, {name: tuple(t.shape) for name, t in weights.items()}, model.config.to_dict())


def elements(spec, number):
    generator = torch.Generator().manual_seed(0)
    return [Element.random(spec.spaces, generator) for _ in range(number)]


def test_going_to_the_universe_and_back_is_exact(llama):
    weights, spec = llama
    p = elements(spec, 1)[0]
    there = transform(weights, spec, p.inverse())
    assert not torch.equal(there["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    back = transform(there, spec, p)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_maps_around_any_cycle_of_models_give_the_weights_back_bit_for_bit(llama):
    weights, spec = llama
    models = elements(spec, 3)
    for i, j, k in itertools.product(range(3), repeat=3):
        cycle = models[i] @ models[j].inverse() @ models[j] @ models[k].inverse() @ models[k] @ models[i].inverse()
        assert all(transform_tensor(name, t, spec, cycle) is t for name, t in weights.items())


def test_permutations_survive_a_file_and_fit_only_their_own_network(llama, tmp_path):
    weights, spec = llama
    p = elements(spec, 1)[0]
    save_file(p.pack(), tmp_path / "p.safetensors")
    again = Element.unpack(spec.spaces, load_file(tmp_path / "p.safetensors"))
    first, second = transform(weights, spec, p), transform(weights, spec, again)
    assert all(torch.equal(first[name], second[name]) for name in weights)
    narrow = transformer("LlamaForCausalLM", intermediate_size=24)[0]
    other = resolve(None, {n: tuple(t.shape) for n, t in narrow.state_dict().items()}, narrow.config.to_dict())
    assert other.digest() != spec.digest()
    with pytest.raises(ValueError, match="ffn"):
        Element.unpack(other.spaces, load_file(tmp_path / "p.safetensors"))


def test_the_spec_does_not_depend_on_the_order_of_the_tensors(llama):
    _, spec = llama
    model, _ = transformer("LlamaForCausalLM", tie_word_embeddings=True)
    backwards = {n: tuple(t.shape) for n, t in reversed(model.state_dict().items())}
    again = resolve(None, backwards, model.config.to_dict())
    assert again.digest() == spec.digest()
    assert list(again.spaces) == list(spec.spaces)


def test_tied_tensors_move_alike_and_arguments_are_left_alone(llama):
    weights, spec = llama
    before = {name: tensor.clone() for name, tensor in weights.items()}
    moved = transform(weights, spec, elements(spec, 1)[0])
    assert torch.equal(moved["lm_head.weight"], moved["model.embed_tokens.weight"])
    assert all(torch.equal(before[name], weights[name]) for name in weights)


def test_counters_are_left_alone_and_dtypes_kept():
    weights = {
        name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in ResNetCifar().state_dict().items()
    }
    spec = resolve(None, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    moved = transform(weights, spec, elements(spec, 1)[0])
    assert {name: t.dtype for name, t in moved.items()} == {name: t.dtype for name, t in weights.items()}
    assert moved["bn1.num_batches_tracked"] is weights["bn1.num_batches_tracked"]


def test_a_checkpoint_of_another_shape_is_refused_by_tensor_and_axis():
    spec = resolve(None, {n: tuple(t.shape) for n, t in ResNetCifar().state_dict().items()})
    p = elements(spec, 1)[0]
    weights = randomised(ResNetCifar()).state_dict()
    with pytest.raises(PlanError, match=r"linear\.weight is \(5, 31\)"):
        transform({**weights, "linear.weight": torch.zeros(5, 31)}, spec, p)
    with pytest.raises(PlanError, match=r"linear\.weight: axis 1 has length 31, the layout describes 32"):
        transform_tensor("linear.weight", torch.zeros(5, 31), spec, p)
    with pytest.raises(PlanError, match=r"linear\.bias is missing"):
        transform({name: t for name, t in weights.items() if name != "linear.bias"}, spec, p)
    with pytest.raises(PlanError, match=r"stranger is not part"):
        transform({**weights, "stranger": torch.zeros(1)}, spec, p)
    with pytest.raises(PlanError, match=r"stranger is not part"):
        transform_tensor("stranger", torch.zeros(1), spec, p)
