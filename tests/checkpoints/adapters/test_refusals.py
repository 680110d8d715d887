"""What is not merged is refused by name, and the advice that comes with it works."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn

import mergetool
from mergetool.checkpoints.adapters import AdapterAlone, AdapterSource
from mergetool.checkpoints.adapters.refusals import REFUSED_FIELDS
from mergetool.checkpoints.adapters.settings import HONOURED, OF_TRAINING
from mergetool.errors import SourceError
from mergetool.tensors.folder import open_model
from tests.checkpoints.adapters.peft_oracle import (
    Trained,
    assert_merged_as_by_peft,
    disturb,
    quiet,
    read_all,
    train,
)
from tests.checkpoints.adapters.test_oracle import gpt2, llama, tied


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(1)
    return train(tmp_path_factory.mktemp("plain"), llama(), target_modules=["q_proj"], r=2)


@pytest.fixture
def trained(plain: Trained, tmp_path: Path) -> Trained:
    """A plain adapter that a test may change."""
    shutil.copytree(plain.adapter, tmp_path / "adapter")
    return Trained(plain.model, tmp_path / "adapter", plain.merged)


def follow(advice: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python that an error told to type."""
    monkeypatch.chdir(folder)
    match = re.search(r'python -c "(.*?)"', advice)
    assert match
    with quiet():
        exec(match[1], {})


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"enable_lora": [True, False, True]},
        {"arrow_config": {"top_k": 2}},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1.0}},
        {"use_qalora": True},
        {"megatron_config": {"hidden_size": 32}},
        {"use_dora": True},
    ],
)
def test_a_field_that_makes_more_of_it_than_plain_lora_is_refused_by_name(
    fields: dict[str, Any], trained: Trained
) -> None:
    trained.set(**fields)
    with pytest.raises(SourceError) as caught:
        trained.source()
    name, value = next(iter(fields.items()))
    assert name in str(caught.value)
    assert caught.value.fix
    assert name != "init_lora_weights" or str(value) in caught.value.what


def test_fields_of_training_and_empty_ones_say_nothing(trained: Trained) -> None:
    trained.set(lora_dropout=0.3, inference_mode=False, megatron_config=None, of_tomorrow=None, target_modules="x")
    assert trained.source().warnings == ()


def test_every_field_that_peft_has_is_known() -> None:
    """A version with a new one must be looked at: does it change what an adapter means?"""
    unknown = {field.name for field in fields(LoraConfig)} - HONOURED - OF_TRAINING - REFUSED_FIELDS.keys()
    assert unknown == set()


def test_what_other_trainers_write_is_read(trained: Trained) -> None:
    trained.set(base_model_name_or_path=None, unsloth_fixed=True, unsloth_version="2026.1", revision="main")
    source = assert_merged_as_by_peft(trained)
    assert source.made_for is None
    assert ["unsloth_fixed: True, unsloth_version" in text for text in source.warnings] == [True]


def test_an_unknown_field_is_a_warning_that_names_it(trained: Trained) -> None:
    trained.set(of_tomorrow={"scale": 3})
    (text,) = trained.source().warnings
    assert "of_tomorrow: {'scale': 3}" in text


def test_lora_ga_is_merged_as_peft_does_with_a_word(trained: Trained) -> None:
    trained.set(init_lora_weights="lora_ga")
    with quiet():
        base = hf.LlamaForCausalLM.from_pretrained(trained.model)
        merged = PeftModel.from_pretrained(base, trained.adapter).merge_and_unload().state_dict()
    source = assert_merged_as_by_peft(Trained(trained.model, trained.adapter, merged))
    assert "lora_ga" in source.warnings[0]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_merging_with_peft_as_advised_gives_what_training_reached(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    trained = train(tmp_path, llama(), target_modules=["q_proj"], r=2, init_lora_weights=start)
    with pytest.raises(SourceError, match="init_lora_weights") as caught:
        trained.source()
    follow(caught.value.fix, tmp_path, monkeypatch)
    found = load_file(tmp_path / "merged/model.safetensors")
    for name, value in trained.merged.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_base_that_training_changed_and_saved_takes_the_adapter_as_it_is(tmp_path: Path) -> None:
    """The other advice: the residual is the model, and init_lora_weights says so."""
    torch.manual_seed(1)
    with quiet():
        adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"))
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        ids = torch.arange(3, 9)[None]
        wanted = adapted.eval()(ids).logits
        adapted.unload().save_pretrained(tmp_path / "model")
    with pytest.raises(SourceError) as caught:
        AdapterSource(open_model(tmp_path / "model"), tmp_path / "adapter")
    assert "set init_lora_weights to true" in caught.value.fix
    Trained(tmp_path / "model", tmp_path / "adapter", {}).set(init_lora_weights=True)
    torch.testing.assert_close(logits(tmp_path, "model", "adapter", ids), wanted, rtol=1e-4, atol=1e-5)


def logits(folder: Path, model: str, adapter: str, ids: torch.Tensor) -> torch.Tensor:
    """Answers of what a recipe makes of a model and an adapter."""
    reference = {"source": str(folder / model), "adapters": [str(folder / adapter)]}
    recipe = {"models": {"a": reference}, "merge": {"method": "passthrough"}}
    mergetool.run(recipe, output=folder / "out")
    with torch.no_grad():
        return hf.AutoModelForCausalLM.from_pretrained(folder / "out").eval()(ids).logits


def test_pissa_that_peft_converted_to_plain_lora_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = llama()
    base.save_pretrained(tmp_path / "model")
    with quiet():
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"))
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "start")
        adapted.peft_config["default"].init_lora_weights = "pissa"
        disturb(adapted)
        ids = torch.arange(3, 9)[None]
        wanted = adapted.eval()(ids).logits
        adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(logits(tmp_path, "model", "adapter", ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"], r=2),
        LoraConfig(target_modules=["q_proj"], r=2, kasa_config=KasaConfig()),
    ],
    ids=["ia3", "loha", "kasa"],
)
def test_kinds_that_peft_can_merge_come_with_a_command_that_does(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    base = llama()
    base.save_pretrained(tmp_path / "model")
    with quiet():
        again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "model")
        adapted = get_peft_model(again, config)
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        ids = torch.arange(3, 9)[None]
        wanted = adapted.eval()(ids).logits
    with pytest.raises(SourceError) as caught:
        AdapterSource(open_model(tmp_path / "model"), tmp_path / "adapter")
    with pytest.raises(SourceError) as alone:
        AdapterAlone(tmp_path / "adapter")
    assert alone.value.fix == caught.value.fix
    follow(caught.value.fix, tmp_path, monkeypatch)
    recipe = {"models": {"a": str(tmp_path / "merged")}, "merge": {"method": "passthrough"}}
    mergetool.run(recipe, output=tmp_path / "out")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_were_repeated_are_repeated_as_advised(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base, settings = llama(), {"target_modules": ["q_proj"], "r": 2, "layer_replication": [[0, 2], [1, 2]]}
    base.save_pretrained(tmp_path / "model")
    with quiet():
        adapted = get_peft_model(base, LoraConfig(**settings))
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        ids = torch.arange(3, 9)[None]
        wanted = adapted.eval()(ids).logits
    with pytest.raises(SourceError) as caught:
        AdapterSource(open_model(tmp_path / "model"), tmp_path / "adapter")
    written = re.search(r"\{recipe: .*\}\}", caught.value.fix)
    assert written
    reference = yaml.safe_load(written[0].replace("MODEL", str(tmp_path / "model")))
    Trained(tmp_path / "model", tmp_path / "adapter", {}).set(layer_replication=None)
    models = {"a": reference | {"adapters": [str(tmp_path / "adapter")]}}
    mergetool.run({"models": models, "merge": {"method": "passthrough"}}, output=tmp_path / "out")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["q_proj"], total_step=9),
        LoKrConfig(target_modules=["q_proj"], r=2),
        VeraConfig(target_modules=["q_proj"], r=2),
        OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_kinds_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    with quiet():
        get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=f"peft_type is '{config.peft_type.value}'") as caught:
        AdapterAlone(tmp_path)
    assert "merge it with peft" in caught.value.fix


def test_a_folder_of_adapters_says_which_there_are(trained: Trained) -> None:
    """peft saves a second adapter into a folder of its own."""
    outer = trained.adapter.parent / "both"
    shutil.copytree(trained.adapter, outer / "chat")
    with pytest.raises(SourceError, match="but in its folders chat") as caught:
        AdapterAlone(outer)
    AdapterAlone(Path(caught.value.fix.removeprefix("name one of them: ")))


def test_kinds_that_are_no_part_of_weights_are_left_out(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    with quiet():
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SourceError, match="PREFIX_TUNING") as caught:
        AdapterSource(open_model(tmp_path / "model"), tmp_path / "adapter")
    assert "leave it out" in caught.value.fix
    models = {"a": {"source": str(tmp_path / "model"), "adapters": []}}
    mergetool.run({"models": models, "merge": {"method": "passthrough"}}, output=tmp_path / "out")


def test_a_rank_that_was_written_wrong_is_put_right_as_advised(trained: Trained) -> None:
    trained.set(r=4)
    with pytest.raises(SourceError) as caught:
        trained.source()
    assert "rank 2" in caught.value.what
    assert "says 4" in caught.value.what
    trained.set(r=int(caught.value.fix.partition("to ")[2].split()[0]))
    assert_merged_as_by_peft(trained)


def test_an_older_pickled_adapter_is_read_without_running_code(trained: Trained) -> None:
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    (trained.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no adapter_model\.safetensors and no adapter_model\.bin"):
        trained.source()
    torch.save(tensors, trained.adapter / "adapter_model.bin")
    assert_merged_as_by_peft(trained)
    torch.save({"x": nn.Linear(1, 1)}, trained.adapter / "adapter_model.bin")
    with pytest.raises(SourceError, match="may hold code"):
        trained.source()


def test_an_adapter_saved_under_another_name_is_read_and_several_at_once_are_not(trained: Trained) -> None:
    path = trained.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    mine = {name.replace(".weight", ".mine.weight"): value for name, value in tensors.items()}
    save_file(mine, path)
    assert_merged_as_by_peft(trained)
    others = {name.replace(".mine.", ".other."): value.clone() for name, value in mine.items()}
    save_file(mine | others, path)
    with pytest.raises(SourceError, match="several adapters at once: mine, other"):
        trained.source()


def test_saving_one_adapter_alone_as_advised_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path / "model")
    with quiet():
        base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "model")
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2), adapter_name="mine")
        adapted.add_adapter("other", LoraConfig(target_modules=["v_proj"], r=2))
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "saved", selected_adapters=["mine"])
    source = AdapterSource(open_model(tmp_path / "model"), tmp_path / "saved/mine")
    assert all(name.endswith("q_proj.weight") for name in source.adapted)


def test_an_untrained_adapter_is_said_to_change_nothing(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    with quiet():
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    reference = {"source": str(tmp_path / "model"), "adapters": [str(tmp_path / "adapter")]}
    plan = mergetool.plan({"models": {"a": reference}, "merge": {"method": "passthrough"}})
    assert any("changes nothing" in text for text in plan.warnings)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_change_that_reaches_a_tied_layer_too_is_told(target: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = train(tmp_path, tied(), target_modules=[target]).source()
    assert any(target in text and "tied" in text for text in source.warnings)


def test_a_redundant_copy_of_a_tied_layer_follows_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = train(tmp_path, tied(), target_modules=["embed_tokens"])
    tensors = load_file(trained.model / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, trained.model / "model.safetensors")
    source = trained.source()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wanted = trained.merged["model.embed_tokens.weight"]
        torch.testing.assert_close(read_all(source, name), wanted, rtol=1e-5, atol=1e-6)


def test_tensors_of_a_head_that_a_model_lacks_need_a_reason(trained: Trained) -> None:
    path = trained.adapter / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.strange.weight": torch.ones(2, 2)}, path)
    with pytest.raises(SourceError, match=r"has no tensor 'strange\.weight'") as caught:
        trained.source()
    assert str(trained.model) in caught.value.fix
    trained.set(modules_to_save=["strange"])
    assert trained.source().added == {"strange.weight"}


def test_conv1d_of_gpt2_is_known_even_where_the_file_says_nothing_of_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = train(tmp_path, gpt2(), target_modules=["c_proj"])
    for flag in (True, False):
        trained.set(fan_in_fan_out=flag)
        assert_merged_as_by_peft(trained)


def test_labels_that_lie_beside_a_head_are_told(trained: Trained) -> None:
    (trained.adapter / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}}))
    assert trained.source().labels == {"0": "no", "1": "yes"}


def test_planning_with_an_adapter_imports_no_torch(trained: Trained) -> None:
    code = (
        "import sys; from pathlib import Path; from mergetool.checkpoints.adapters import AdapterAlone, AdapterSource; "
        "from mergetool.tensors.folder import open_model; "
        f"AdapterSource(open_model(Path({str(trained.model)!r})), Path({str(trained.adapter)!r})); "
        f"AdapterAlone(Path({str(trained.adapter)!r})); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_layers_that_are_called_otherwise_in_memory_are_merged_by_peft_as_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = hf.SwinForImageClassification(config)
    trained = train(tmp_path, model, target_modules=["k_proj"], modules_to_save=["classifier"])
    with pytest.raises(SourceError, match="has no tensor") as caught:
        trained.source()
    follow(caught.value.fix, tmp_path, monkeypatch)
    found = load_file(tmp_path / "merged/model.safetensors")
    for name, value in trained.merged.items():
        torch.testing.assert_close(found[name], value)
