"""Small tensors in float32 stay wide where the rest is stored in 16 bits, and people are told how many."""

import json

import pytest
import torch
import transformers as hf
from safetensors import safe_open

import mergetool
from mergetool.errors import RecipeError
from mergetool.outputs.record import KEPT_WIDE
from mergetool.recipe import load_recipe
from tests.checkpoints.recipes import recipe_of
from tests.files import write_model
from tests.zoo import files
from tests.zoo.build import config_of, stir

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def deepseek(folder, seed, dtype=torch.bfloat16):
    """As transformers saves it: this correction is a float32 buffer whatever the model's dtype."""
    config = hf.DeepseekV3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    made = hf.DeepseekV3ForCausalLM(config)
    stir(made, seed)
    made.save_pretrained(folder / "wide")
    hf.DeepseekV3ForCausalLM.from_pretrained(folder / "wide", dtype=dtype).save_pretrained(folder)
    return folder


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_correction_of_a_router_stays_wide_in_a_real_network(tmp_path, dtype):
    models = [deepseek(tmp_path / name, seed, dtype) for seed, name in enumerate(("base", "a", "b"))]
    islands = {BIAS} if dtype == torch.float32 else {name for name, kind in stored(models[0]).items() if kind == "F32"}
    assert BIAS in islands
    result = mergetool.run(recipe_of(*models, output={"dtype": "bfloat16"}), output=tmp_path / "out")
    assert stored(result.path) == {name: "F32" if name in islands else "BF16" for name in files.weights(models[0])}
    assert result.notes[KEPT_WIDE] == len(islands)
    lock = json.loads((result.path / "mergetool.json").read_text())
    assert {name for name, notes in lock["notes"].items() if KEPT_WIDE in notes} == islands
    assert config_of(result.path)["dtype"] == "bfloat16"
    base, a, b = (files.weights(folder)[BIAS].double() for folder in models)
    opened = hf.DeepseekV3ForCausalLM.from_pretrained(result.path, dtype="auto").state_dict()[BIAS]
    torch.testing.assert_close(opened.double(), base + 0.5 * (a - base + b - base), rtol=0, atol=1e-6)


def test_it_is_narrowed_where_the_recipe_says_so(tmp_path):
    models = [deepseek(tmp_path / name, seed) for seed, name in enumerate(("base", "a"))]
    output = {"dtype": "bfloat16", "keep_float32": False}
    result = mergetool.run(recipe_of(*models, output=output), output=tmp_path / "out")
    assert set(stored(result.path).values()) == {"BF16"}
    assert KEPT_WIDE not in result.notes


def test_time_constants_stay_wide_and_what_is_all_wide_does_not(tmp_path):
    names = ["mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.in_proj.weight", "norm.weight"]
    for name in "ab":
        write_model(tmp_path / name, {each: torch.randn(8) for each in names})
    recipe = recipe_of(None, tmp_path / "a", tmp_path / "b", method="linear", output={"dtype": "float16"})
    found = stored(mergetool.run(recipe, output=tmp_path / "out").path)
    assert [found[name] for name in names] == ["F32", "F32", "F32", "F16", "F16"]


@pytest.mark.parametrize("output", [{}, {"dtype": "float32"}, {"dtype": "source"}])
def test_a_setting_that_narrows_nothing_is_refused_and_the_advice_helps(output):
    recipe = {"models": {"a": "a"}, "merge": {"method": "passthrough"}}
    with pytest.raises(RecipeError, match="this would have no effect") as caught:
        load_recipe(recipe | {"output": output | {"keep_float32": False}})
    assert caught.value.fix == "remove `keep_float32`, or write dtype: bfloat16"
    load_recipe(recipe | {"output": output})
    load_recipe(recipe | {"output": {"dtype": "bfloat16", "keep_float32": False}})
