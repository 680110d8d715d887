"""LoRA adapters applied while reading, against peft's own merge_and_unload."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mergetool
from mergetool.errors import SourceError
from mergetool.tensors.adapter import AdapterSource
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import open_model

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)


def save_with_adapter(
    folder: Path, model: torch.nn.Module, **settings: object
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """(model folder, adapter folder, peft's merged state dict); the adapter's factors are random, not zero."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "model")
    with warnings.catch_warnings():  # peft asks transformers 5 for an attribute that it is about to rename
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    with warnings.catch_warnings():  # it says that it saves embedding layers too
        warnings.simplefilter("ignore", UserWarning)
        adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    return folder / "model", folder / "adapter", merged


def read_all(source: AdapterSource, name: str, step: int) -> torch.Tensor:
    """A whole float32 tensor, read in slices of `step` elements that do not respect rows."""
    spec = source.specs[name]
    out = torch.empty(spec.num_elements)
    for start in range(0, spec.num_elements, step):
        source.read_bytes(name, start * 4, bytes_of(out[start : start + step]))
    return out.view(spec.shape)


CASES = {
    "plain": (LLAMA, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised": (LLAMA, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["v_proj"]}),
    "patterns": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "embedding": (LLAMA, {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "o_proj"]}),
    "saved modules": (LLAMA, {"r": 2, "lora_alpha": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "transposed": (GPT2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_pefts_own_merge(case: str, tmp_path: Path) -> None:
    config, settings = CASES[case]
    torch.manual_seed(1)
    model = (GPT2LMHeadModel if config is GPT2 else LlamaForCausalLM)(config)
    folder, adapter, merged = save_with_adapter(tmp_path, model, **settings)
    source = AdapterSource(open_model(folder), adapter)
    changed = 0
    for name in source.specs:
        original = load_file(folder / "model.safetensors")[name]
        torch.testing.assert_close(read_all(source, name, 37), merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(original, merged[name])
    assert changed >= len(settings["target_modules"])


def test_a_recipe_applies_adapters_and_keeps_the_storage_dtype(tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder, adapter, merged = save_with_adapter(tmp_path, LlamaForCausalLM(LLAMA), **CASES["plain"][1])
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    recipe = {
        "models": {"chat": {"source": str(folder), "adapters": [str(adapter)]}},
        "merge": {"method": "passthrough"},
        "output": {"path": str(tmp_path / "out")},
    }
    result = load_file(mergetool.run(recipe).path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert result[name].dtype == torch.bfloat16
    delta = merged[name] - load_file(folder / "model.safetensors")[name].float()
    torch.testing.assert_close(result[name].float(), merged[name], rtol=2**-7, atol=1e-4)
    assert delta.abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "not a LoRA"),
        ({"bias": "all"}, "trained biases"),
    ],
)
def test_adapters_that_are_not_understood_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder, adapter, _ = save_with_adapter(tmp_path, LlamaForCausalLM(LLAMA), **CASES["plain"][1])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(SourceError, match=message):
        AdapterSource(open_model(folder), adapter)


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, adapter, _ = save_with_adapter(tmp_path / "a", LlamaForCausalLM(LLAMA), **CASES["plain"][1])
    GPT2LMHeadModel(GPT2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SourceError, match="has no tensor") as caught:
        AdapterSource(open_model(tmp_path / "gpt2"), adapter)
    assert "down_proj" in caught.value.where
