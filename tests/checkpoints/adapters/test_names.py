"""Adapters whose names, classes or vocabularies are not those of the model's file, against peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import mergetool
from mergetool.checkpoints.adapters import AdapterSource
from mergetool.errors import SourceError
from mergetool.tensors.folder import open_model
from tests.checkpoints.adapters.peft_oracle import (
    LLAMA,
    SMALL,
    Trained,
    assert_merged_as_by_peft,
    disturb,
    quiet,
    read_all,
    train,
)
from tests.checkpoints.adapters.test_oracle import MOE, T5, gemma3, llama, mixtral, tied

BERT = hf.BertConfig(**SMALL, max_position_embeddings=32)
ROBERTA = hf.RobertaConfig(**SMALL, max_position_embeddings=32)
OTHER_CLASSES: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "head on a bare bert": (
        lambda: hf.BertModel(BERT),
        hf.BertForSequenceClassification,
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
    "head on a masked bert": (
        lambda: hf.BertForMaskedLM(BERT),
        hf.BertForTokenClassification,
        {"target_modules": ["query"], "task_type": "TOKEN_CLS"},
    ),
    "head on a bare roberta": (
        lambda: hf.RobertaModel(ROBERTA),
        hf.RobertaForSequenceClassification,
        {"target_modules": ["value"], "task_type": "SEQ_CLS"},
    ),
    "score on a language model": (
        llama,
        hf.LlamaForSequenceClassification,
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "score on a bare llama": (
        lambda: hf.LlamaModel(hf.LlamaConfig(**LLAMA)),
        hf.LlamaForSequenceClassification,
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "answers from a bare t5": (
        lambda: hf.T5Model(hf.T5Config(**T5)),
        hf.T5ForQuestionAnswering,
        {"target_modules": ["q"], "task_type": "QUESTION_ANS"},
    ),
    "a bare adapter on a head model": (
        lambda: hf.RobertaForMaskedLM(ROBERTA),
        hf.RobertaModel,
        {"target_modules": ["query"]},
    ),
}


@pytest.mark.parametrize("case", OTHER_CLASSES)
def test_the_result_opens_as_the_class_that_was_trained_and_answers_as_it_does(case: str, tmp_path: Path) -> None:
    model, kind, settings = OTHER_CLASSES[case]
    torch.manual_seed(1)
    trained = train(tmp_path, model(), trained=kind, **settings)
    recipe = {
        "models": {"a": {"source": str(trained.model), "adapters": [str(trained.adapter)]}},
        "merge": {"method": "passthrough"},
        "output": {"path": str(tmp_path / "out")},
    }
    mergetool.run(recipe)
    with quiet():
        found, wanted = (kind.from_pretrained(tmp_path / folder).eval() for folder in ("out", "merged"))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids)[0], wanted(ids)[0], rtol=1e-5, atol=1e-6)
    if "task_type" in settings:
        assert trained.source().added == {name for name in trained.merged if name.startswith(("cl", "sc", "qa"))}


@pytest.mark.parametrize(("model", "target"), [(llama, "q_proj"), (tied, "q_proj"), (tied, "embed_tokens")])
def test_a_vocabulary_that_grew_comes_with_the_adapter(model: Any, target: str, tmp_path: Path) -> None:
    base = model()
    base.save_pretrained(tmp_path / "model")
    with quiet():
        base.resize_token_embeddings(64)
        adapted = get_peft_model(base, LoraConfig(target_modules=[target], r=2))
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        again = type(base).from_pretrained(tmp_path / "model")
        again.resize_token_embeddings(64)
        PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    source = assert_merged_as_by_peft(Trained(tmp_path / "model", tmp_path / "adapter", merged))
    assert source.specs["model.embed_tokens.weight"].shape == (64, 32)
    assert "model.embed_tokens.weight" in source.replaced


def test_a_head_that_did_not_grow_with_the_embeddings_is_refused_and_trained_as_advised_fits(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "model")

    def trained_with(**settings: Any) -> AdapterSource:
        with quiet():
            grown = hf.LlamaForCausalLM.from_pretrained(tmp_path / "model")
            grown.resize_token_embeddings(64)
            adapted = get_peft_model(grown, LoraConfig(target_modules=["embed_tokens"], r=2, **settings))
            adapted.save_pretrained(tmp_path / "adapter")
        return AdapterSource(open_model(tmp_path / "model"), tmp_path / "adapter")

    with pytest.raises(
        SourceError, match=r"64 rows of model\.embed_tokens\.weight, but lm_head\.weight keeps its 61"
    ) as e:
        trained_with()
    assert "modules_to_save=['lm_head']" in e.value.fix
    assert trained_with(modules_to_save=["lm_head"]).specs["lm_head.weight"].shape == (64, 32)


def test_saved_modules_are_read_as_older_files_name_them(tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = hf.RobertaForSequenceClassification(ROBERTA)
    trained = train(tmp_path, model, **settings)
    path = trained.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for mark in ("modules_to_save.", "modules_to_save.default."):
        save_file({name.replace("classifier.", f"classifier.{mark}"): each for name, each in tensors.items()}, path)
        assert_merged_as_by_peft(trained)


def renamed(folder: Path, *pairs: tuple[str, str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_multimodal_files_of_older_layouts_are_understood(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = train(tmp_path, gemma3(), target_modules=["q_proj", "fc1"])
    wanted = trained.merged
    renamed(trained.model, ("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."))
    source = trained.source()
    for name, value in wanted.items():
        stored = name.replace("model.language_model.", "language_model.model.")
        stored = stored.replace("model.vision_tower.", "vision_tower.")
        torch.testing.assert_close(read_all(source, stored), value, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_text_model_fits_the_text_part_of_a_multimodal_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = gemma3()
    whole.save_pretrained(tmp_path / "whole")
    text = hf.Gemma3ForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    trained = train(tmp_path, text, target_modules=["q_proj", "up_proj"])
    source = AdapterSource(open_model(tmp_path / "whole"), trained.adapter)
    assert len(source.adapted) == 4
    for name in source.adapted:
        assert name.startswith(("model.language_model.", "language_model.model."))
        own = "model." + name.partition("layers.")[1] + name.partition("layers.")[2]
        torch.testing.assert_close(read_all(source, name), trained.merged[own], rtol=1e-5, atol=1e-6)


def test_adapters_of_single_experts_fit_files_of_single_experts(tmp_path: Path) -> None:
    """As transformers 4 named them; peft converts them to its fused parameters when it loads them."""
    torch.manual_seed(1)
    trained = train(tmp_path, mixtral(), target_modules=["q_proj"], r=2, lora_alpha=6)
    tensors = {}
    for layer in range(2):
        for expert in range(MOE["num_local_experts"]):
            for leaf, (size_in, size_out) in {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}.items():
                site = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                tensors[f"{site}.lora_A.weight"] = torch.randn(2, size_in) / 4
                tensors[f"{site}.lora_B.weight"] = torch.randn(size_out, 2) / 4
    save_file(tensors, trained.adapter / "adapter_model.safetensors")
    trained.set(target_modules=["w1", "w2", "w3"])
    with quiet():
        base = hf.MixtralForCausalLM.from_pretrained(trained.model)
        merged = PeftModel.from_pretrained(base, trained.adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "again")
    wanted = load_file(tmp_path / "again/model.safetensors")
    assert_merged_as_by_peft(Trained(trained.model, trained.adapter, wanted))


def test_adapters_stack_in_their_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(tmp_path / "first", llama(), target_modules=["q_proj"], use_dora=True)
    with quiet():
        base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "first/merged")
    second = train(tmp_path / "second", base, target_modules=["q_proj", "k_proj"], use_dora=True, r=2)
    source = AdapterSource(first.source(), second.adapter)
    for name, value in second.merged.items():
        torch.testing.assert_close(read_all(source, name), value, rtol=1e-5, atol=1e-6)


class Square(nn.Module):
    """A layer whose shape tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_the_flag_decides_only_where_nothing_else_does(tmp_path: Path) -> None:
    trained = train(tmp_path, Square(), target_modules=["layer"], r=2)
    change = trained.merged["layer.weight"] - load_file(trained.model / "model.safetensors")["layer.weight"]
    assert_merged_as_by_peft(trained)
    trained.set(fan_in_fan_out=True)
    flagged = (
        read_all(trained.source(), "layer.weight") - load_file(trained.model / "model.safetensors")["layer.weight"]
    )
    torch.testing.assert_close(flagged, change.T)
    (trained.model / "config.json").write_text('{"model_type": "llama"}')
    assert_merged_as_by_peft(trained)


class Both(nn.Module):
    """Both kinds of layers, of shapes that tell, in a model that no config describes."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = Conv1D(6, 4)
        self.plain = nn.Linear(4, 6)


def test_shapes_tell_the_kinds_of_layers_apart_where_no_config_does(tmp_path: Path) -> None:
    trained = train(tmp_path, Both(), target_modules=["transposed", "plain"], r=2, use_dora=True)
    for flag in (True, False):
        trained.set(fan_in_fan_out=flag)
        assert_merged_as_by_peft(trained)


def test_a_head_that_is_tied_by_default_follows_an_adapter_on_the_embeddings(tmp_path):
    """Configs of transformers 4 do not say what is so by default, and files hold the head again."""
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=8)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base/model.safetensors")
    save_file(state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, tmp_path / "base/model.safetensors")
    told = json.loads((tmp_path / "base/config.json").read_text())
    del told["tie_word_embeddings"]
    (tmp_path / "base/config.json").write_text(json.dumps(told))
    with quiet():
        model = get_peft_model(
            hf.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["wte"])
        )
        for name, value in model.named_parameters():
            if "lora_embedding" in name:
                nn.init.normal_(value)
        model.save_pretrained(tmp_path / "lora")
    merged = mergetool.run(
        {
            "models": {"a": {"source": str(tmp_path / "base"), "adapters": [str(tmp_path / "lora")]}},
            "merge": {"method": "passthrough"},
        },
        output=tmp_path / "out",
    )
    result = load_file(merged.path / "model.safetensors")
    assert torch.equal(result["lm_head.weight"], result["transformer.wte.weight"])
    ids = torch.arange(6)[None]
    with quiet():
        expected = model.merge_and_unload().eval()(ids).logits
    found = hf.GPT2LMHeadModel.from_pretrained(merged.path).eval()(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
