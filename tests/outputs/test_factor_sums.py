"""Adapters summed up half by half, from files to a file: what PEFT's own sum of them is."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import mergetool
from mergetool.errors import PlanError
from mergetool.recipe.load import load_recipe
from tests.checkpoints.adapters.peft_oracle import quiet
from tests.files import write_recipe
from tests.outputs.test_merged_adapters import NETWORKS, merged_by_peft, start, train

ALPHAS = {"a": 6, "b": 8, "c": 5}
WEIGHTS = {"a": 0.5, "b": -0.25, "c": 1.0}


def three(folder, network="llama", ranks=(4, 4, 4)):
    """Adapters of different scales; one of them for other layers, too."""
    make, settings = NETWORKS[network]
    again = start(folder, make)
    for seed, (name, rank) in enumerate(zip("abc", ranks, strict=True)):
        train(folder, name, again(), seed, r=rank, lora_alpha=ALPHAS[name], **settings)
    return again


def summed_by_peft(again, folder):
    with quiet():
        model = PeftModel.from_pretrained(again(), folder / "a", adapter_name="a")
        for name in "bc":
            model.load_adapter(folder / name, adapter_name=name)
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="linear")
        model.set_adapter("sum")
        return model.merge_and_unload().state_dict()


def recipe(folder, **more):
    models = {name: {"adapter": name} for name in "abc"}
    merge = {"method": "factor-sum", "weight": WEIGHTS}
    return write_recipe(folder / "sum.yaml", **{"models": models, "merge": merge, "output": {"path": "out"}, **more})


@pytest.mark.parametrize("network", ["llama", "gpt2", "words"])
def test_a_sum_of_factors_is_that_of_peft(tmp_path, network):
    again = three(tmp_path, network)
    mergetool.run(recipe(tmp_path))
    made, expected = merged_by_peft(again, tmp_path / "out"), summed_by_peft(again, tmp_path)
    assert any(not torch.equal(value, again().state_dict()[name]) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-5)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(each.shape) for each in written.values()} == {4}


def test_different_ranks_are_refused_and_the_advice_works(tmp_path):
    three(tmp_path, ranks=(4, 2, 4))
    with pytest.raises(PlanError, match="the ranks 2, 4 here") as raised:
        mergetool.plan(load_recipe(recipe(tmp_path)))
    assert raised.value.fix == "choose merge: {method: linear} and output: {rank: 4}"
    mergetool.run(recipe(tmp_path, merge={"method": "linear"}, output={"path": "out", "rank": 4}))


@pytest.mark.parametrize("whole", [{"base": "base", "output": {"path": "out"}}, {"models": {"a": "base", "b": "base"}}])
def test_whole_models_are_refused(tmp_path, whole):
    three(tmp_path)
    more = {"merge": {"method": "factor-sum"}}
    with pytest.raises(PlanError, match="nothing but adapters by themselves") as raised:
        mergetool.plan(load_recipe(recipe(tmp_path, **more, **whole)))
    assert "{adapter: PATH}" in raised.value.fix
    alone = recipe(tmp_path, **more, base="base", output={"path": "out", "kind": "adapter"})
    assert mergetool.plan(load_recipe(alone)).steps


def test_state_dicts_are_refused():
    with pytest.raises(PlanError, match="nothing but adapters by themselves"):
        mergetool.merge_state_dicts("factor-sum", {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}})
