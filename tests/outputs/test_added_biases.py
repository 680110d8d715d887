"""`lora_bias`: what factors add to biases, which PEFT has at all layers of an adapter or at none."""

import warnings

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

import mergetool
from mergetool.errors import PlanError
from mergetool.planning import make_plan
from mergetool.recipe.load import load_recipe
from tests.checkpoints.adapters.peft_oracle import LLAMA
from tests.outputs.test_merged_adapters import BERT, Net, assert_same_merge, merged_by_peft, recipes, start, train

QWEN = {**LLAMA, "num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def bert():
    return hf.BertForMaskedLM(BERT)


def qwen():
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN))


def pair(folder, make, first, second):
    again = start(folder, make)
    train(folder, "a", again(), 1, **{"r": 2, "lora_bias": True, **first})
    train(folder, "b", again(), 2, **{"r": 3, **second})
    return again


def opened(again, folder):
    """What PEFT opens, with a failure where it misses anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(again(), folder)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (bert, ["query"], ["query", "value"]),
        (Net, ["conv2"], ["attention", "conv2", "linear"]),
    ],
)
def test_layers_of_the_others_get_biases_of_zeros(tmp_path, make, first, second):
    again = pair(tmp_path, make, {"target_modules": first}, {"target_modules": second})
    alone, _ = recipes(tmp_path, "linear", names="ab")
    plan = make_plan(load_recipe(alone))
    mergetool.run(alone)
    opened(again, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= plan.bytes_at_most
    base = {name: tensor.double() for name, tensor in again().state_dict().items()}
    one, two = (merged_by_peft(lambda: again().double(), tmp_path / name) for name in "ab")
    made = merged_by_peft(lambda: again().double(), tmp_path / "out")
    assert any(name.endswith("bias") and not torch.equal(made[name], base[name]) for name in made)
    for name in made:
        torch.testing.assert_close(made[name], (one[name] + two[name]) / 2, rtol=0, atol=1e-6, msg=name)


def test_a_bias_whose_weight_comes_to_nothing_is_kept(tmp_path):
    overrides = [{"match": "*.0.*query.weight", "weight": 0.0}]
    again = pair(tmp_path, bert, {"target_modules": ["query"]}, {"target_modules": ["value"]})
    alone, whole = recipes(tmp_path, "task-arithmetic", names="ab", overrides=overrides)
    for recipe in (alone, whole):
        mergetool.run(recipe)
    opened(again, tmp_path / "out")
    assert_same_merge(tmp_path, again)


@pytest.mark.parametrize(
    ("make", "other", "first"),
    [
        (qwen, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, ["q_proj"]),
        (bert, {"target_modules": ["position_embeddings"]}, ["query"]),
    ],
)
def test_what_peft_has_no_such_biases_for_is_refused_and_the_advice_works(tmp_path, make, other, first):
    again = pair(tmp_path, make, {"target_modules": first}, other)
    alone, whole = recipes(tmp_path, "linear", names="ab")
    with pytest.raises(PlanError, match="opens no adapter that has both that and this") as caught:
        mergetool.run(alone)
    assert caught.value.fix == "add base: MODEL and output: {kind: checkpoint}"
    mergetool.run(whole)
    one, two = (merged_by_peft(again, tmp_path / name) for name in "ab")
    made = type(again()).from_pretrained(tmp_path / "whole").state_dict()
    for name in made:
        torch.testing.assert_close(made[name], (one[name] + two[name]) / 2, rtol=0, atol=2e-6, msg=name)


def test_a_bias_without_its_weight_is_refused_and_the_advice_works(tmp_path):
    again = pair(tmp_path, bert, {"target_modules": ["query"]}, {"target_modules": ["value"]})
    overrides = [{"match": "*.0.*query.weight", "use": "base"}]
    alone, _ = recipes(tmp_path, "linear", names="ab", overrides=overrides)
    with pytest.raises(PlanError, match="only at layers whose weight is changed") as caught:
        mergetool.run(alone)
    name = "bert.encoder.layer.0.attention.self.query.bias"
    assert caught.value.fix == f"keep the base's: overrides: [{{match: {name!r}, use: base}}]"
    alone, _ = recipes(tmp_path, "linear", names="ab", overrides=[*overrides, {"match": name, "use": "base"}])
    mergetool.run(alone)
    opened(again, tmp_path / "out")
    assert not any(".0.attention.self.query" in key for key in load_file(tmp_path / "out/adapter_model.safetensors"))
