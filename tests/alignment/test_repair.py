"""REPAIR: activations of a merged network against those of its parents, measured independently."""

import pytest
import torch
from torch import nn

from mergetool.alignment.repair import correctable, repair, reset_statistics
from tests.alignment import nets
from tests.arch.networks import MLP, ResNetCifar, transformer

WIDTHS = (6, 20, 16, 4)


def data(rows=60, seed=0, shape=(6,)):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def outputs(network, weights, layer, batch):
    """What a layer gives out, per channel: (channels, everything else)."""
    network.load_state_dict({**network.state_dict(), **weights})
    network.eval()
    kept = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *args: kept.append(args[2]))
    with torch.no_grad():
        network(batch)
    handle.remove()
    axis = 1 if kept[0].ndim == 4 else -1
    return kept[0].movedim(axis, 0).flatten(1).double()


def mean(states):
    return {name: sum(state[name].float() for state in states) / len(states) for name in states[0]}


def test_means_and_standard_deviations_of_every_layer_become_the_parents_average():
    parents = [nets.mlp(seed) for seed in range(3)]
    merged, batch, network = mean(parents), data(), MLP(WIDTHS)
    layers = ["layers.0", "layers.1"]
    found = repair(network, merged, parents, layers=layers, batches=[batch])
    assert set(found.tensors) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    for layer in layers:
        wanted = [outputs(network, parent, layer, batch) for parent in parents]
        ours = outputs(network, merged | found.tensors, layer, batch)
        goal_mean = torch.stack([x.mean(1) for x in wanted]).mean(0)
        goal_std = torch.stack([x.std(1, correction=0) for x in wanted]).mean(0)
        torch.testing.assert_close(ours.mean(1), goal_mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.std(1, correction=0), goal_std, atol=1e-4, rtol=0)
        assert found.ratios[layer] < 0.9  # the average was too quiet


def test_several_batches_give_nearly_what_one_gives():
    parents = [nets.mlp(seed) for seed in range(2)]
    batch = data(4000)
    one, many = (
        repair(MLP(WIDTHS), mean(parents), parents, layers=["layers.0", "layers.1"], batches=batches).tensors
        for batches in ([batch], list(batch.split(1000)))
    )
    for name, x in one.items():
        torch.testing.assert_close(many[name], x, atol=0.05, rtol=0.05)


def test_copies_of_one_network_need_no_repair():
    state = nets.mlp()
    found = repair(MLP(WIDTHS), state, [state, state], layers=["layers.0", "layers.1"], batches=[data()])
    for name, x in found.tensors.items():
        torch.testing.assert_close(x, state[name], atol=1e-5, rtol=1e-5)
    assert found.ratios == pytest.approx({"layers.0": 1, "layers.1": 1}, abs=1e-5)


def test_a_layer_without_bias_is_scaled_only():
    network = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    parents = [{"0.weight": data(8, s), "2.weight": data(2, s, (8,)), "2.bias": torch.zeros(2)} for s in range(2)]
    found = repair(network, mean(parents), parents, layers=["0"], batches=[data()])
    assert set(found.tensors) == {"0.weight"}
    ratio = found.tensors["0.weight"] / mean(parents)["0.weight"]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    wanted = [outputs(network, parent, "0", data()).std(1, correction=0) for parent in parents]
    ours = outputs(network, mean(parents) | found.tensors, "0", data()).std(1, correction=0)
    torch.testing.assert_close(ours, sum(wanted) / 2, atol=1e-5, rtol=0)


def test_constant_channels_are_left_alone():
    parents = [nets.mlp(seed) for seed in range(2)]
    for parent in parents:
        parent["layers.0.weight"][3] = 0
        parent["layers.0.bias"][3] = 7
    merged = mean(parents)
    found = repair(MLP(WIDTHS), merged, parents, layers=["layers.0"], batches=[data()])
    assert torch.equal(found.tensors["layers.0.weight"][3], merged["layers.0.weight"][3])
    assert found.tensors["layers.0.bias"][3] == 7
    assert all(bool(torch.isfinite(x).all()) for x in found.tensors.values())


def test_batch_norm_statistics_are_those_of_the_merged_network():
    parents = [nets.resnet(seed) for seed in range(2)]
    merged, network = mean(parents), ResNetCifar("B")
    batches = list(data(40, shape=(3, 8, 8)).split(20))
    found = reset_statistics(network, merged, batches)
    first = [outputs(ResNetCifar("B"), merged, "conv1", batch) for batch in batches]
    expected = torch.stack([x.mean(1) for x in first]).mean(0)
    torch.testing.assert_close(found.tensors["bn1.running_mean"].double(), expected, atol=1e-5, rtol=0)
    variance = torch.stack([x.var(1) for x in first]).mean(0)
    torch.testing.assert_close(found.tensors["bn1.running_var"].double(), variance, atol=1e-4, rtol=1e-4)
    assert all(name.split(".")[-1] in ("running_mean", "running_var") for name in found.tensors)


def test_a_network_without_batch_norm_has_no_statistics_to_measure():
    with pytest.raises(ValueError, match="no batch norm"):
        reset_statistics(MLP(WIDTHS), nets.mlp(), [data()])


def test_weights_that_do_not_fit_the_network_are_named():
    state = {name: x for name, x in nets.mlp().items() if name != "layers.1.bias"}
    with pytest.raises(ValueError, match=r"layers\.1\.bias"):
        repair(MLP(WIDTHS), state, [state], layers=["layers.0"], batches=[data()])


def test_linear_layers_of_gpt2_are_found_with_their_outputs_on_the_other_axis():
    module, batch = transformer("GPT2LMHeadModel")
    layers = {name: axis for name, (_, axis) in correctable(module).items()}
    assert layers["transformer.h.0.mlp.c_fc"] == 1
    parents = [{k: v.clone() for k, v in nets.noisy(module.state_dict(), s, 0.5).items()} for s in range(2)]
    found = repair(module, mean(parents), parents, layers=["transformer.h.0.mlp.c_fc"], batches=[batch])
    assert found.tensors["transformer.h.0.mlp.c_fc.weight"].shape == (12, 48)
