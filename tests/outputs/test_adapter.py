"""Adapters from whole models: PEFT opens them, and what it computes is what the whole models compute."""

import json
import warnings

import pytest
import torch
import transformers as hf
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.engine.device_worker import DeviceWorker
from mergetool.engine.sinks import MemorySink
from mergetool.engine.worker import Worker
from mergetool.errors import MergeError, PlanError, RecipeError
from mergetool.planning import make_plan
from mergetool.recipe.load import load_recipe
from tests.elsewhere import DEVICE, Elsewhere
from tests.files import write_recipe

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {**SMALL, "num_key_value_heads": 2}
BERT = {**SMALL, "max_position_embeddings": 32}
T5 = {"vocab_size": 61, "decoder_start_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
VIT = {key: SMALL[key] for key in list(SMALL)[1:]} | {"image_size": 32, "patch_size": 16}

NETWORKS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA)),
    "llama with tied words": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**BERT)),
    "bert with a task head": (hf.BertForSequenceClassification, hf.BertConfig(**BERT, num_labels=3)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**SMALL, max_position_embeddings=40)),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5, num_heads=4)),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**VIT)),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**VIT)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**LLAMA, head_dim=8)),
}


def fine_tuned(kind, config, folder, *, seed=1, by=0.02, dtype=torch.float32):
    """A base, and the same with every parameter moved; saved by transformers."""
    torch.manual_seed(0)
    base = kind(config).to(dtype)
    base.save_pretrained(folder / "base")
    tuned = kind.from_pretrained(folder / "base", dtype=dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    tuned.save_pretrained(folder / f"tuned{seed}")
    return tuned.eval()


def answer(model):
    """What a model computes for a fixed input."""
    torch.manual_seed(3)
    words = torch.randint(2, 60, (2, 7))
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    seq2seq = {"input_ids": words, "decoder_input_ids": words}
    kinds = {"vit": images, "siglip_vision_model": images, "t5": seq2seq}
    inputs = kinds.get(model.config.model_type, {"input_ids": words})
    with torch.no_grad():
        made = model.eval()(**inputs)
    return made.logits if "logits" in made else made.pooler_output


def opened(kind, folder, adapter):
    """The base with an adapter, by PEFT; every warning that it gives of the file is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing adapter keys|did not match).*")
        return PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), adapter)


def recipe(folder, method="passthrough", models=("tuned1",), rank="exact", **output):
    merge = method if isinstance(method, dict) else {"method": method}
    return write_recipe(
        folder / "recipe.yaml",
        base="base",
        models={name: name for name in models},
        merge=merge,
        output={"path": "out", "kind": "adapter", **({} if rank is None else {"rank": rank}), **output},
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_peft_computes_with_it_what_the_model_computes(tmp_path, name):
    kind, config = NETWORKS[name]
    tuned = fine_tuned(kind, config, tmp_path)
    mergetool.run(recipe(tmp_path))
    adapted = opened(kind, tmp_path, tmp_path / "out")
    torch.testing.assert_close(answer(adapted), answer(tuned), rtol=0, atol=1e-5)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "README.md", "mergetool.json"}


def test_the_merge_of_two_is_the_checkpoint_of_the_same_merge(tmp_path):
    kind, config = NETWORKS["llama"]
    for seed in (1, 2):
        fine_tuned(kind, config, tmp_path, seed=seed)
    models = ("tuned1", "tuned2")
    ties = {"method": "ties", "density": 0.5}
    mergetool.run(recipe(tmp_path, ties, models))
    plain = write_recipe(
        tmp_path / "plain.yaml",
        base="base",
        models={name: name for name in models},
        merge=ties,
        output={"path": "whole"},
    )
    mergetool.run(plain)
    whole = kind.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(answer(opened(kind, tmp_path, tmp_path / "out")), answer(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [4, {"energy": 0.9}])
def test_factors_are_those_of_the_svd_and_the_lock_says_what_they_lose(tmp_path, rank):
    kind, config = NETWORKS["llama"]
    fine_tuned(kind, config, tmp_path)
    result = mergetool.run(recipe(tmp_path, rank=rank))
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned1"))
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    measured = json.loads((tmp_path / "out" / "mergetool.json").read_text())["measured"]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    layers = [name for name in base if "proj" in name]
    for name in layers:
        u, s, vh = torch.linalg.svd((tuned[name].double() - base[name].double()), full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        kept = rank if isinstance(rank, int) else int((share < rank["energy"]).sum()) + 1
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = made[f"{module}.lora_B.weight"].double() @ made[f"{module}.lora_A.weight"].double()
        best = (u[:, :kept] * s[:kept]) @ vh[:kept]
        torch.testing.assert_close(product, best, rtol=0, atol=1e-7)
        assert measured[name]["rank"] == kept
        assert measured[name]["lost by the rank"] == pytest.approx(float(1 - share[kept - 1]) ** 0.5, rel=1e-6)
        own = name.removesuffix(".weight")
        assert settings["rank_pattern"].get(own, settings["r"]) == kept
        assert settings["alpha_pattern"].get(own, settings["lora_alpha"]) == kept
    (note,) = result.notes
    assert note.startswith("cut to the rank: up to 0.")
    assert result.notes[note] == len(layers)


def test_what_is_the_bases_own_leaves_nothing(tmp_path):
    kind, config = NETWORKS["bert"]
    fine_tuned(kind, config, tmp_path)
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned1"))
    changed = {name for name in base if ".1.attention.self.query" in name}
    state = {name: tuned[name] if name in changed else base[name] for name in base}
    save_file(state, tmp_path / "tuned1" / "model.safetensors", {"format": "pt"})
    mergetool.run(recipe(tmp_path))
    module = "base_model.model.bert.encoder.layer.1.attention.self.query"
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert made.keys() == {f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.base_layer.bias"}
    adapted = opened(kind, tmp_path, tmp_path / "out")
    torch.testing.assert_close(answer(adapted), answer(kind.from_pretrained(tmp_path / "tuned1")), rtol=0, atol=1e-5)


def test_an_adapter_of_norms_alone_opens(tmp_path):
    kind, config = NETWORKS["llama"]
    fine_tuned(kind, config, tmp_path)
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned1"))
    state = {name: tuned[name] if "norm" in name else base[name] for name in base}
    save_file(state, tmp_path / "tuned1" / "model.safetensors", {"format": "pt"})
    mergetool.run(recipe(tmp_path))
    adapted = opened(kind, tmp_path, tmp_path / "out")
    torch.testing.assert_close(answer(adapted), answer(kind.from_pretrained(tmp_path / "tuned1")), rtol=0, atol=1e-5)


def test_a_model_that_is_the_base_is_refused(tmp_path):
    fine_tuned(*NETWORKS["llama"], tmp_path, by=0.0)
    with pytest.raises(MergeError, match="nothing of the base is changed"):
        mergetool.run(recipe(tmp_path))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_experts_are_refused_and_the_advice_works(tmp_path):
    kind = hf.MixtralForCausalLM
    fine_tuned(kind, hf.MixtralConfig(**LLAMA, num_local_experts=3), tmp_path)
    with pytest.raises(PlanError, match="in memory it is part of another tensor") as caught:
        mergetool.run(recipe(tmp_path))
    advice = yaml.safe_load(caught.value.fix.partition("overrides: ")[2].partition(", or write")[0])
    keep = {"method": "passthrough", "overrides": advice}
    mergetool.run(recipe(tmp_path, keep))
    adapted = opened(kind, tmp_path, tmp_path / "out").merge_and_unload().state_dict()
    tuned = kind.from_pretrained(tmp_path / "tuned1").state_dict()
    for name in tuned:
        if "experts" not in name:
            torch.testing.assert_close(adapted[name], tuned[name], rtol=0, atol=1e-5)


def test_another_vocabulary_is_refused(tmp_path):
    kind, config = NETWORKS["llama"]
    tuned = fine_tuned(kind, config, tmp_path)
    tuned.resize_token_embeddings(70)
    tuned.save_pretrained(tmp_path / "tuned1")
    with pytest.raises(PlanError, match=r"\[70, 32\]"):
        mergetool.run(recipe(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": {"kind": "checkpoint", "rank": 3}}, "only an adapter has a rank"),
        ({"output": {"kind": "adapter"}}, "add rank: 32"),
        ({"output": {"kind": "adapter", "rank": 0}}, "expected a whole number above 0"),
        ({"output": {"kind": "adapter", "rank": {"energy": 1.0}}}, "between 0 and 1"),
        ({"output": {"kind": "adapter", "rank": 2, "shard_size": "1GB"}}, "one file of factors"),
        ({"output": {"kind": "adapter", "rank": 2}, "base": None}, "add base: PATH"),
        ({"output": {"kind": "adapter", "rank": 2}, "tokenizer": {"source": "union"}}, "vocabulary"),
        ({"output": {"kind": "adapter", "rank": 2}, "merge": {"method": "tsv-compress"}}, "no adapter can hold"),
        ({"output": {"kind": "adapter", "rank": 2}, "slices": [{"a": [0, 1]}]}, "another network"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(tmp_path, change, words):
    asked = {"base": "base", "models": {"a": "a"}, "merge": {"method": "passthrough"}, **change}
    path = write_recipe(tmp_path / "recipe.yaml", **{key: value for key, value in asked.items() if value is not None})
    with pytest.raises(RecipeError) as caught:
        mergetool.load_recipe(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("rank", [4, {"energy": 0.9}, "exact"])
def test_a_device_makes_the_same_changes(tmp_path, rank):
    fine_tuned(*NETWORKS["llama"], tmp_path)
    plan = make_plan(load_recipe(recipe(tmp_path, rank=rank)))
    here, there = MemorySink(plan), MemorySink(plan)
    _perform(plan, here, Worker(plan, here))
    with Elsewhere():
        _perform(plan, there, DeviceWorker(plan, there, DEVICE))
    for name in here.tensors:
        torch.testing.assert_close(there.tensors[name], here.tensors[name], rtol=0, atol=1e-6)


def _perform(plan, sink, worker):
    for tensor in sink.tensors.values():
        tensor.zero_()
    for step in plan.steps:
        for start, stop in step.pieces():
            worker.perform(step, start, stop, {})
