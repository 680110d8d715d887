"""Is an adapter what a recipe of adapters says: by what it adds to the weights, whatever its factors."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import mergetool
from mergetool.engine.against import verify_against
from mergetool.recipe import load_recipe
from tests.dense import write_dense

WEIGHTS = {"a": 0.3, "b": 0.7}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, two adapters of other ranks, and what PEFT puts together of them."""
    folder = tmp_path_factory.mktemp("home")
    write_dense(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, name in enumerate(WEIGHTS):
            model = LlamaForCausalLM.from_pretrained(folder / "base")
            adapted = get_peft_model(
                model, LoraConfig(r=2 + seed, lora_alpha=3, target_modules=["q_proj", "down_proj"])
            )
            torch.manual_seed(seed)
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.data.normal_()
            adapted.save_pretrained(folder / name)
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "a", "a")
        model.load_adapter(folder / "b", "b")
        model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "both", combination_type="cat")
        model.save_pretrained(folder / "peft", selected_adapters=["both"])
    return folder


def linear(home, **weights):
    models = {name: {"adapter": str(home / name)} for name in WEIGHTS}
    return {"models": models, "merge": {"method": "linear", "weight": weights or WEIGHTS}}


def ask(path, recipe):
    return verify_against(path, load_recipe(recipe))


@pytest.fixture
def made(home, tmp_path):
    return mergetool.run(linear(home), output=tmp_path / "made").path


def change(path, edit):
    """Edit the first pair of factors."""
    state = load_file(path / "adapter_model.safetensors")
    first = next(name for name in state if "lora_A" in name)
    second = first.replace("lora_A", "lora_B")
    state[first], state[second] = (each.contiguous() for each in edit(state[first], state[second]))
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})


def test_what_a_run_has_made_and_what_peft_puts_together_are_the_recipe(home, made):
    assert ask(made, linear(home)).answer == "yes"
    found = ask(home / "peft" / "both", linear(home))
    assert (found.answer, sum(found.tensors.values())) == ("yes", 6)


def test_other_factors_of_the_same_product_are_the_same_adapter(home, made):
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    change(made, lambda a, b: (3 * turn.mT @ a, b @ turn / 3))
    assert ask(made, linear(home)).answer == "yes"
    change(made, lambda a, b: (a, 1.01 * b))
    found = ask(made, linear(home))
    assert (found.answer, found.tensors["different"]) == ("no", 1)


def test_other_weights_and_a_module_left_out_are_a_no(home, made):
    assert ask(made, linear(home, a=0.5, b=0.5)).answer == "no"
    state = load_file(made / "adapter_model.safetensors")
    kept = {name: value for name, value in state.items() if "layers.0.mlp.down_proj" not in name}
    save_file(kept, made / "adapter_model.safetensors", metadata={"format": "pt"})
    found = ask(made, linear(home))
    assert (found.answer, [each.name for each in found.worst]) == ("no", ["model.layers.0.mlp.down_proj.weight"])


def test_narrow_factors_are_the_same_to_their_rounding(home, made):
    state = load_file(made / "adapter_model.safetensors")
    save_file(
        {k: v.bfloat16() for k, v in state.items()}, made / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    assert ask(made, linear(home)).answer == "yes"


def test_a_checkpoint_is_no_adapter_and_the_fix_asks_for_it(home, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(home / "base"), home / "a")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    recipe = {"models": {"a": {"adapter": str(home / "a")}}, "merge": {"method": "linear"}}
    found = ask(tmp_path / "merged", recipe)
    assert (found.answer, found.reason) == ("no", "it is no adapter, and the recipe makes one")
    assert "models: {merged: {source: BASE, adapters: [ADAPTER]}}" in found.fix
    asked = {"models": {"merged": {"source": str(home / "base"), "adapters": [str(home / "a")]}}}
    assert ask(tmp_path / "merged", {**asked, "merge": {"method": "passthrough"}}).answer == "yes"


def test_an_adapter_that_is_missing_is_told(home, made, tmp_path):
    shutil.copytree(home / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    recipe = linear(home)
    recipe["models"] = {**recipe["models"], "a": {"adapter": str(tmp_path / "a")}}
    assert ask(made, recipe).answer == "cannot tell"
