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
from mergetool.checkpoints.adapters import AdapterSource
from mergetool.errors import SourceError
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of
from tests.checkpoints.adapters.peft_oracle import merged_by_peft, train
from tests.files import StoppedError, stop_after

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
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
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


# -------------------------------------------------------------------- broken and hostile adapters

A, B = "base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"
SOUND = {A: torch.ones(2, 6), B: torch.ones(4, 2)}


def adapted(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object] | str) -> AdapterSource:
    """A model of a 4 x 6 weight, a vector and whole numbers, with an adapter of these tensors and settings."""
    weights = {"layer.weight": torch.ones(4, 6), "norm.weight": torch.ones(4), "ids.weight": torch.ones(4, 6).long()}
    save_file(weights, folder / "model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")
    if not isinstance(settings, str):
        settings = json.dumps({"peft_type": "LORA", "lora_alpha": 2, **settings})
    (folder / "adapter_config.json").write_bytes(settings.encode("latin-1"))
    return AdapterSource(open_model(folder), folder)


def test_a_sound_adapter_is_read_also_with_the_adapters_name_in_its_names(tmp_path: Path) -> None:
    for tensors in (SOUND, {name.replace(".weight", ".default.weight"): value for name, value in SOUND.items()}):
        source = adapted(tmp_path, tensors, {})
        data = bytearray(96)
        source.read_bytes("layer.weight", 0, memoryview(data))
        assert torch.frombuffer(data, dtype=torch.float32).eq(1 + 2 / 2 * 2).all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "the adapter changes nothing"),
        ({A: SOUND[A]}, "lora_B.weight is missing"),
        ({B: SOUND[B]}, "lora_A.weight is missing"),
        ({**SOUND, B: torch.ones(4, 3)}, "B A is no matrix"),
        ({A: torch.ones(0, 6), B: torch.ones(4, 0)}, "B A is no matrix"),
        ({**SOUND, A: torch.ones(6)}, "B A is no matrix"),
        ({**SOUND, A: torch.tensor(1.0)}, "B A is no matrix"),
        ({**SOUND, A: torch.ones(2, 6, 1)}, "B A is no matrix"),
        ({**SOUND, A: torch.ones(2, 5)}, "B A is [4, 5], layer.weight is [4, 6]"),
        ({**SOUND, A: torch.ones(2, 6).char()}, "A is I8, B is F32"),
        ({name.replace("layer", "norm"): value for name, value in SOUND.items()}, "norm.weight is [4]"),
        ({name.replace("layer", "ids"): value for name, value in SOUND.items()}, "ids.weight is I64"),
        ({**SOUND, "base_model.model.layer.weight": torch.ones(4, 6)}, "is both adapted and replaced"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        adapted(tmp_path, tensors, {})
    assert message in caught.value.what
    assert str(tmp_path) in caught.value.where


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "not a LoRA adapter"),
        ({"lora_alpha": "2"}, "the alpha of layer is '2'"),
        ({"lora_alpha": None}, "the alpha of layer is None"),
        ({"lora_alpha": float("nan")}, "the alpha of layer is nan"),
        ({"lora_alpha": True}, "the alpha of layer is True"),
        ({"lora_alpha": 10**400}, "the alpha of layer is 1000"),
        ({"use_rslora": "true"}, "use_rslora is 'true', not true or false"),
        ({"modules_to_save": "layer"}, "modules_to_save is 'layer', not a list of texts"),
        ({"target_parameters": [1]}, "target_parameters is '[1]', not a list of texts"),
        ({"task_type": {"a": 1}}, "not a text"),
        ({"peft_type": ["LORA"]}, "not a text"),
        ({"layer_replication": [5]}, "layer_replication is set"),
        ({"alpha_pattern": [1]}, "alpha_pattern does not map"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern does not map"),
        ({"alpha_pattern": {"layer": [1]}}, "the alpha of layer is [1]"),
    ],
)
def test_adapter_settings_that_make_no_sense_are_refused(
    settings: dict[str, object] | str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        adapted(tmp_path, SOUND, settings)
    assert message in caught.value.what


def test_a_run_does_not_go_on_with_another_alpha(tmp_path: Path) -> None:
    adapted(tmp_path, SOUND, {})
    reference = {"source": str(tmp_path), "adapters": [str(tmp_path)]}
    recipe = {"models": {"m": reference}, "merge": {"method": "linear"}}
    with pytest.raises(StoppedError):
        mergetool.run(recipe, output=tmp_path / "out", progress=stop_after(1))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    assert not mergetool.run(recipe, output=tmp_path / "out").resumed
    found = load_file(tmp_path / "out/model.safetensors")["layer.weight"]
    assert found.eq(1 + 3 / 2 * 2).all()
    lock = json.loads((tmp_path / "out/mergetool.json").read_text())
    names = [Path(entry["file"]).name for entry in lock["inputs"]["m"]]
    assert names == ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"]
    assert all(entry["sha256"] for entry in lock["inputs"]["m"])


def test_a_row_of_zeros_keeps_its_length_whatever_its_magnitude(tmp_path: Path) -> None:
    """peft divides zero by zero there; all other rows are as it merges them."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LLAMA)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    trained = train(tmp_path, model, target_modules=["q_proj", "embed_tokens"], use_dora=True, r=2)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    tensors[name][3] = 0
    save_file(tensors, trained.adapter / "adapter_model.safetensors")
    wanted = merged_by_peft(tmp_path, model)["model.layers.0.self_attn.q_proj.weight"]
    assert wanted[3].isnan().all()
    found = read_all(trained.source(), "model.layers.0.self_attn.q_proj.weight", 37)
    torch.testing.assert_close(found, wanted.nan_to_num(0), rtol=1e-5, atol=1e-6)


def test_a_column_of_zeros_stays_zero_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, 5] = 0
    trained = train(tmp_path, model, target_modules=["c_attn"], use_dora=True, init_lora_weights=True, r=2)
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"][5] = 0
    save_file(tensors, trained.adapter / "adapter_model.safetensors")
    wanted = merged_by_peft(tmp_path, model)["transformer.h.0.attn.c_attn.weight"]
    assert wanted[:, 5].isnan().all()
    found = read_all(trained.source(), "transformer.h.0.attn.c_attn.weight", 37)
    torch.testing.assert_close(found, wanted.nan_to_num(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_added_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder, adapter, _ = save_with_adapter(tmp_path, LlamaForCausalLM(LLAMA), **CASES["plain"][1])
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
    wanted = load_file(folder / "model.safetensors")[f"{module}.weight"].double() + 6 / 4 * b @ a
    found = read_all(AdapterSource(open_model(folder), adapter), f"{module}.weight", 37)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
