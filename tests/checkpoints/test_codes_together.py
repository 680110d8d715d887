"""Quantised models with what else people do to models: an adapter on top (QLoRA), experts one by one."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergetool
from tests.checkpoints.test_codes import fp8, quantised
from tests.zoo.build import build, change_config
from tests.zoo.files import rewritten, weights


@pytest.mark.parametrize("form", ["nf4, nested", "GPTQ", "blocks"])
def test_an_adapter_is_merged_into_what_the_codes_mean(form, tmp_path):
    meant = quantised(tmp_path / "codes", build(tmp_path / "plain", "llama", 0), form)
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = torch.randn(2, 16) / 10, torch.randn(meant[name].shape[0], 2) / 10
    own = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "lora").mkdir()
    halves = {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
    save_file(halves, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    model = {"source": str(tmp_path / "codes"), "adapters": [str(tmp_path / "lora")]}
    recipe = {"models": {"m": model}, "merge": {"method": "passthrough"}, "output": {"dtype": "float32"}}
    written = load_file(mergetool.run(recipe, output=tmp_path / "out").path / "model.safetensors")
    torch.testing.assert_close(written[name].double(), meant[name] + 2 * b.double() @ a.double(), rtol=1e-6, atol=1e-7)


def test_experts_of_codes_are_merged_with_plain_ones(tmp_path):
    plain, other = (build(tmp_path / name, "qwen3-moe", seed) for seed, name in enumerate("ab"))
    meant = {}

    def change(state):
        stored = {}
        for name, value in state.items():
            if "_proj.weight" in name:
                made, meant[name] = fp8((8, 8))(name, value.double())
                stored |= made
            else:
                stored[name] = value
        return stored

    codes = rewritten(tmp_path / "codes", plain, change)
    change_config(codes, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    models = {"b": str(other), "codes": str(codes)}
    result = mergetool.run({"models": models, "merge": {"method": "linear"}}, output=tmp_path / "out")
    written, theirs = load_file(result.path / "model.safetensors"), weights(other)
    assert any("experts" in name for name in meant)
    for name, value in meant.items():
        torch.testing.assert_close(written[name].double(), (value + theirs[name].double()) / 2, rtol=1e-6, atol=1e-7)


def test_its_recipe_runs_from_end_to_end(tmp_path):
    text = (Path(__file__).parents[2] / "recipes" / "quantised.yaml").read_text()
    meant = quantised(tmp_path / "models" / "small", build(tmp_path / "plain", "llama", 0), "AWQ")
    other = build(tmp_path / "models" / "tuned", "llama", 1)
    (tmp_path / "recipe.yaml").write_text(text)
    result = mergetool.run(tmp_path / "recipe.yaml")
    assert result.path == tmp_path / yaml.safe_load(text)["output"]["path"]
    written, theirs = load_file(result.path / "model.safetensors"), weights(other)
    for name in [name for name in meant if "_proj.weight" in name]:
        value = meant[name]
        wanted = 0.4 * value + 0.6 * theirs[name].double()
        torch.testing.assert_close(written[name].double(), wanted, rtol=1e-6, atol=1e-6)
