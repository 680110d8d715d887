"""Adapters as they lie about: of several towers, of experts, of new words, broken, alike, or idle."""

import json
import shutil
import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import MergeError, OutputError, PlanError, RecipeError, SourceError
from mergetool.outputs.verify import verify_output
from tests.checkpoints.adapters.peft_oracle import LLAMA, SMALL, quiet
from tests.files import LONG, write_recipe
from tests.limits import files_of_at_most
from tests.outputs.test_merged_adapters import (
    ALL,
    BERT,
    MOE,
    Net,
    assert_same_merge,
    llama,
    merged_by_peft,
    once,
    recipes,
    start,
    train,
)
from tests.turns import pairs

VISION = {key: SMALL[key] for key in list(SMALL)[1:]} | {"image_size": 32, "patch_size": 16}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def merge(folder, again, method="linear", rank=None, names="ab", **settings):
    """Merge both ways, and see that PEFT finds all that the adapter says it has, and that both are the same."""
    alone, whole = recipes(folder, method, rank, names, **settings)
    mergetool.run(alone)
    mergetool.run(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        PeftModel.from_pretrained(again(), folder / "out")
    assert_same_merge(folder, again)


def two(folder, make=llama, first=None, second=None):
    def both(place):
        again = start(place, make)
        train(place, "a", again(), 1, **{"target_modules": ALL, "r": 2, **(first or {})})
        train(place, "b", again(), 2, **{"target_modules": ALL, "r": 3, **(second or {})})
        return again

    return once(folder, ("two", make, repr(first), repr(second)), both)


def clip():
    words = {**SMALL, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=words, vision_config=dict(VISION), projection_dim=16))


def gemma3():
    text = {**LLAMA, "head_dim": 8, "sliding_window": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=dict(VISION), mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def t5():
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(decoder_start_token_id=0, **sizes))


def whisper():
    config = hf.WhisperConfig(vocab_size=61, num_mel_bins=8, d_model=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.update(dict.fromkeys(("encoder_layers", "decoder_layers"), 2))
    config.update(dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4))
    config.update(dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48))
    config.update(dict.fromkeys(("max_source_positions", "max_target_positions"), 16) | {"decoder_start_token_id": 1})
    return hf.WhisperForConditionalGeneration(config)


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**MOE))


TEXT_ONLY = {"target_modules": r"text_model\..*\.(q_proj|fc1)"}
OF_LANGUAGE = {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}
CASES = {
    "two towers, one adapter of one": (clip, {"target_modules": ["q_proj"]}, TEXT_ONLY),
    "gemma3, language only": (gemma3, {"target_modules": ["q_proj"]}, OF_LANGUAGE),
    "t5": (t5, {"target_modules": ["q", "v"]}, {"target_modules": ["q", "wo", "shared"]}),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        {"target_modules": "all-linear"},
        {"target_modules": ["projection"]},
    ),
    "convolutions along one axis": (whisper, {"target_modules": ["q_proj", "conv1"]}, {"target_modules": ["conv2"]}),
    "regex and excluded": (
        llama,
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    ),
    "attention, which PEFT wraps with its output layer": (
        Net,
        {"target_modules": ["attention"]},
        {"target_modules": ["linear"], "rank_pattern": {"linear": 1}},
    ),
    "the output layer": (llama, {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["lm_head"]}),
    "parameters as targets": (
        llama,
        {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
        {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    ),
    "experts of several ranks": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS[:1],
            "rank_pattern": {"mlp.experts.gate_up_proj": 5},
        },
    ),
    "experts, each adapter of another part": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_two_adapters_are_summed(tmp_path, case):
    make, first, second = CASES[case]
    merge(tmp_path, two(tmp_path, make, first, second))


@pytest.mark.parametrize(
    "method", ["linear", "tsv-merge", "iso-c", "knots", "multislerp"] if LONG else ["linear", "iso-c", "knots"]
)
def test_the_same_adapter_twice(tmp_path, method):
    again = two(tmp_path)
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    merge(tmp_path, again, method)


@pytest.mark.parametrize("method", ["linear", "tsv-merge", "iso-c", "knots"] if LONG else ["linear", "tsv-merge"])
def test_one_of_them_changes_nothing(tmp_path, method):
    again = two(tmp_path)
    with quiet():
        get_peft_model(again(), LoraConfig(target_modules=ALL, r=2)).save_pretrained(tmp_path / "b")
    merge(tmp_path, again, method)


def test_nothing_at_all_is_refused(tmp_path):
    again = start(tmp_path, llama)
    for name in "ab":
        with quiet():
            get_peft_model(again(), LoraConfig(target_modules=ALL, r=2)).save_pretrained(tmp_path / name)
    alone, _ = recipes(tmp_path, "linear", names="ab")
    with pytest.raises(MergeError, match="nothing of the base is changed"):
        mergetool.run(alone)


def test_overrides_that_leave_modules_out(tmp_path):
    """PEFT finds no k_proj in one layer, and no q_proj in the other."""
    overrides = [
        {"match": "*.1.*k_proj.*", "use": "a"},
        {"match": "*.0.*k_proj.*", "use": "base"},
        {"match": "*.1.*q_proj.*", "weight": 0.0},
    ]
    scale = {"gradient": [0.2, 1.0]}
    merge(tmp_path, two(tmp_path), "task-arithmetic", weight={"a": 0.0, "b": -1.5}, scale=scale, overrides=overrides)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == [
        "down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]


def test_densities_of_modules(tmp_path):
    overrides = [{"match": "*.q_proj.*", "density": 0.8}]
    merge(tmp_path, two(tmp_path), "ties", "exact", density=0.3, overrides=overrides)


@pytest.mark.parametrize(("method", "value"), pairs(["linear", "tsv-merge", "ties"], [float("nan"), float("inf")]))
def test_what_is_not_finite_is_refused_and_the_advice_works(tmp_path, value, method):
    again = two(tmp_path)
    path = tmp_path / "b" / "adapter_model.safetensors"
    state = load_file(path)
    next(tensor for name, tensor in state.items() if "q_proj.lora_A" in name)[0, 0] = value
    save_file(state, path, {"format": "pt"})
    alone, _ = recipes(tmp_path, method, "exact", names="ab")
    with pytest.raises(MergeError, match=r"q_proj.weight: model 'b' has factors that are not finite") as caught:
        mergetool.run(alone)
    assert not (tmp_path / "out").exists()
    assert caught.value.fix == "save that adapter again, or leave it out"
    merge(tmp_path, again, method, "exact", names="a")


def larger(again, count):
    with quiet():
        model = again()
        model.resize_token_embeddings(count)
    return model


def test_new_words_of_one_adapter_are_kept(tmp_path):
    """PEFT writes such modules under two names and the base's beside them."""
    again = start(tmp_path, llama)
    words = {"modules_to_save": ["embed_tokens", "lm_head"]}
    train(tmp_path, "a", larger(again, 64), 1, target_modules=ALL, r=2, **words)
    train(tmp_path, "b", again(), 2, target_modules=ALL, r=2)
    assert "base_model.model.lm_head.modules_to_save.weight" in load_file(tmp_path / "a/adapter_model.safetensors")
    mergetool.run(recipes(tmp_path, "linear", names="ab")[0])
    made, own = (merged_by_peft(lambda: larger(again, 64), tmp_path / name) for name in ("out", "a"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(made[name], own[name])


def test_new_words_of_two_adapters_are_refused_and_the_advice_works(tmp_path):
    again = start(tmp_path, llama)
    words = {"modules_to_save": ["embed_tokens", "lm_head"]}
    for seed, name in enumerate("ab"):
        train(tmp_path, name, larger(again, 64 + seed), seed, target_modules=ALL, r=2, **words)
    alone, _ = recipes(tmp_path, "linear", names="ab")
    with pytest.raises(PlanError, match="hold it in full") as caught:
        mergetool.run(alone)
    assert "use: a" in caught.value.fix
    recipes(tmp_path, "linear", names="ab", overrides=[{"match": "*", "use": "a"}])
    mergetool.run(alone)
    made, own = (merged_by_peft(lambda: larger(again, 64), tmp_path / name) for name in ("out", "a"))
    assert torch.equal(made["lm_head.weight"], own["lm_head.weight"])


def test_precisions_may_differ(tmp_path):
    again = two(tmp_path)
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    merge(tmp_path, again)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}


def test_fifty_adapters(tmp_path):
    again = start(tmp_path, llama)
    names = [f"a{index}" for index in range(50)]
    train(tmp_path, "a0", again(), 0, target_modules=["q_proj"], r=1)
    state = load_file(tmp_path / "a0/adapter_model.safetensors")
    for name in names[1:]:
        shutil.copytree(tmp_path / "a0", tmp_path / name)
        moved = {key: value + 0.1 * torch.randn(value.shape) for key, value in state.items()}
        save_file(moved, tmp_path / name / "adapter_model.safetensors", {"format": "pt"})
    merge(tmp_path, again, names=names)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 32


@pytest.mark.parametrize(
    ("more", "words", "advice"),
    [
        ({"merge": {"method": "mass"}}, "what mass leaves is no change of one base", {"base": "base"}),
        (
            {"merge": {"method": "linear"}, "evaluate": [{"name": "arc_easy"}]},
            "nothing to score",
            {"base": "base", "output": {"path": "out", "kind": "checkpoint"}},
        ),
    ],
)
def test_what_no_adapter_can_be_is_refused_and_the_advice_works(tmp_path, more, words, advice):
    two(tmp_path)
    sections = {"models": {name: {"adapter": name} for name in "ab"}, "output": {"path": "out"}, **more}
    with pytest.raises(RecipeError, match=words) as caught:
        mergetool.load_recipe(write_recipe(tmp_path / "recipe.yaml", **sections))
    assert "add base: MODEL" in caught.value.fix
    mergetool.load_recipe(write_recipe(tmp_path / "recipe.yaml", **sections | advice))


def test_a_merged_adapter_is_verified(tmp_path):
    two(tmp_path)
    mergetool.run(recipes(tmp_path, "linear", names="ab")[0])
    report = verify_output(tmp_path / "out")
    assert report["summary"] == "3 files match the lock; 12 tensors are finite"
    with pytest.raises(SourceError, match="cannot open by itself") as caught:
        verify_output(tmp_path / "out", load=True)
    assert caught.value.fix == "leave --load out"
    path = tmp_path / "out" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(SourceError, match="the lock says"):
        verify_output(tmp_path / "out")


def test_an_adapter_that_is_not_finite_does_not_verify(tmp_path):
    two(tmp_path)
    path = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(path)
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(SourceError, match="not finite"):
        verify_output(tmp_path / "a")


def test_adapters_of_a_network_with_a_head_and_of_the_one_inside_are_refused_and_the_advice_works(tmp_path):
    kind = hf.BertForMaskedLM
    again = start(tmp_path, lambda: kind(BERT))
    train(tmp_path, "a", again(), 1, target_modules=["query"], r=2)
    train(tmp_path, "b", hf.BertModel.from_pretrained(tmp_path / "base"), 2, target_modules=["query"], r=2)
    for names in ("ab", "ba"):
        with pytest.raises(PlanError, match="one tensor by two names") as caught:
            mergetool.run(recipes(tmp_path, "linear", names=names)[0])
    assert "{source: MODEL, adapters: [ADAPTER]}" in caught.value.fix
    sections = {
        "base": "base",
        "models": {name: {"source": "base", "adapters": [name]} for name in "ab"},
        "merge": {"method": "task-arithmetic", "scale": 0.5},
    }
    output = {"path": "out", "kind": "adapter", "rank": "exact"}
    mergetool.run(write_recipe(tmp_path / "made.yaml", **sections, output=output))
    mergetool.run(write_recipe(tmp_path / "whole.yaml", **sections, output={"path": "whole"}))
    assert_same_merge(tmp_path, again)


def test_words_that_are_trained_with_the_output_layer_that_is_tied_to_them(tmp_path):
    again = start(tmp_path, lambda: llama(tie_word_embeddings=True))
    for seed, name in enumerate("ab"):
        words = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        train(tmp_path, name, again(), seed, target_modules=["q_proj"], r=2, **words)
    sections = {
        "base": "base",
        "models": {name: {"adapter": name} for name in "ab"},
        "merge": {"method": "task-arithmetic", "scale": 0.6},
    }
    mergetool.run(write_recipe(tmp_path / "made.yaml", **sections, output={"path": "out", "kind": "adapter"}))
    mergetool.run(write_recipe(tmp_path / "whole.yaml", **sections, output={"path": "whole"}))
    assert_same_merge(tmp_path, again)


def test_words_and_their_tied_output_layer_may_come_out_with_other_ranks_and_scales(tmp_path):
    """PEFT would open one layer's factors for both, if the adapter said that they are tied."""
    again = start(tmp_path, lambda: llama(tie_word_embeddings=True))
    words = {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "ensure_weight_tying": True}
    train(tmp_path, "a", again(), 0, **words, rank_pattern={"lm_head": 5}, alpha_pattern={"lm_head": 40})
    train(tmp_path, "b", again(), 1, **words)
    merge(tmp_path, again)
    alone, _ = recipes(tmp_path, "linear", {"energy": 0.6}, names="ab")
    mergetool.run(alone, output=tmp_path / "cut")
    made = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert len(made["base_model.model.lm_head.lora_A.weight"]) == 2
    assert len(made["base_model.model.model.embed_tokens.lora_embedding_A"]) == 3
    with quiet():
        opened = get_peft_model_state_dict(PeftModel.from_pretrained(again(), tmp_path / "cut"))
    assert all(torch.equal(opened[name], tensor) for name, tensor in made.items())


def test_a_file_that_is_too_large_is_told_and_the_advice_works(tmp_path):
    two(tmp_path, first={"r": 32}, second={"r": 32})
    with files_of_at_most(40_000):
        with pytest.raises(OutputError, match="larger than this system allows") as caught:
            mergetool.run(recipes(tmp_path, "linear", names="ab")[0])
        assert "of an adapter a smaller output.rank" in caught.value.fix
        mergetool.run(recipes(tmp_path, "linear", 8, names="ab")[0])
    assert verify_output(tmp_path / "out")


def test_adapters_of_two_networks_are_refused(tmp_path):
    two(tmp_path)
    train(tmp_path, "b", hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | {"hidden_size": 64})), 2, target_modules=ALL, r=2)
    with pytest.raises(PlanError, match=r"model 'a' changes \[32, 48\], model 'b' \[64, 48\]") as caught:
        mergetool.run(recipes(tmp_path, "linear", names="ab")[0])
    assert "leave one of them out" in caught.value.fix
