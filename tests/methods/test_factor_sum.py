"""factor-sum against PEFT's own sum of adapters, and LoraHub's rule by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mergetool.kernels.low_rank import Pair
from mergetool.methods.factor_sum import FactorSum
from mergetool.methods.families.low_rank import Products, merged_products


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(10, 8, bias=False), torch.nn.Linear(8, 6, bias=False))


def adapted(alphas, ranks=(4, 4, 4)):
    """A network with an adapter for each of these alphas, all of them trained at random."""
    config = [LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]) for r, alpha in zip(ranks, alphas, strict=False)]
    model = get_peft_model(network(), config[0], adapter_name="m0")
    for index, each in enumerate(config[1:], 1):
        model.add_adapter(f"m{index}", each)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model, model.base_model.model[0]


def halves(layer, name):
    return layer.lora_B[name].weight.data.double(), layer.lora_A[name].weight.data.double()


def ours(layer, names, weights, form):
    scales = tuple(layer.scaling[name] for name in names)
    pairs = []
    for name, scale in zip(names, scales, strict=True):
        b, a = halves(layer, name)
        pairs.append(Pair(b * scale, a))
    kernel = FactorSum(weight=dict(zip(names, weights, strict=True)), form=form).kernel()
    products = Products("0.weight", (8, 10), tuple(names), pairs, scales=scales)
    return merged_products(kernel, products, kernel.params(0.0, names), None)[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.4, 0.2), (2.0, 0.0, -1.0)])
@pytest.mark.parametrize("alphas", [(4, 4, 4), (8, 4, 2)])
def test_it_is_what_peft_does(weights, alphas):
    model, layer = adapted(alphas)
    names = ["m0", "m1", "m2"]
    model.add_weighted_adapter(names, list(weights), "sum", combination_type="linear")
    expected = layer.get_delta_weight("sum").detach().double()
    found = ours(layer, names, weights, "peft")
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-5)
    assert found.b.shape[1] == 4


def test_lorahub_multiplies_both_matrices_by_the_weight():
    _, layer = adapted((8, 8))
    (b0, a0), (b1, a1) = (halves(layer, name) for name in ("m0", "m1"))
    expected = 2 * (0.5 * b0 - 1.5 * b1) @ (0.5 * a0 - 1.5 * a1)  # the scale is 8 / 4
    torch.testing.assert_close(ours(layer, ["m0", "m1"], (0.5, -1.5), "lorahub").dense(), expected)


@pytest.mark.parametrize("form", ["lorahub", "peft"])
def test_one_adapter_of_weight_1_stays_what_it_is(form):
    _, layer = adapted((3,))
    b, a = halves(layer, "m0")
    torch.testing.assert_close(ours(layer, ["m0"], (1.0,), form).dense(), 0.75 * b @ a)


def test_adapters_that_leave_a_layer_have_no_part_in_its_sum():
    kernel = FactorSum(form="lorahub").kernel()
    one, nothing = Pair(torch.ones(3, 2), torch.ones(2, 4)), Pair(torch.zeros(3, 0), torch.zeros(0, 4))
    products = Products("w", (3, 4), ("a", "b"), [one, nothing])
    torch.testing.assert_close(
        merged_products(kernel, products, kernel.params(0.0, ("a", "b")), None)[0].dense(), one.dense()
    )
    products = Products("w", (3, 4), ("a", "b"), [nothing, nothing])
    assert not merged_products(kernel, products, kernel.params(0.0, ("a", "b")), None)[0].dense().any()


def test_different_ranks_cannot_be_added_up():
    _, layer = adapted((4, 4), ranks=(4, 2))
    with pytest.raises(ValueError, match=r"ranks \[4, 2\]"):
        ours(layer, ["m0", "m1"], (1.0, 1.0), "peft")
