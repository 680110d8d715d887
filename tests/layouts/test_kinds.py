"""Networks whose layers are of several kinds: each keeps its own where config.json can say so, else it is refused."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.errors import PlanError
from tests.layouts.test_rows import put_together
from tests.zoo.build import change_config, config_of, stir
from tests.zoo.families import VOCAB, words
from tests.zoo.oracle import logits, opened

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MOE = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
DEEPSEEK = {**SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
DEEPSEEK |= {"moe_intermediate_size": 8, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4}
DEEPSEEK |= {"qk_nope_head_dim": 4, "v_head_dim": 4, "n_shared_experts": 1}
GEMMA = {**SMALL, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}
QWEN = {**SMALL, "sliding_window": 4, "use_sliding_window": True}
JAMBA = {**SMALL, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
NEO = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 32}
NEO |= {"attention_types": [[["global", "local"], 2]], "window_size": 3, "bos_token_id": 1, "eos_token_id": 2}

KINDS = {
    "deepseek": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**DEEPSEEK, first_k_dense_replace=2)),
    "qwen3-moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**MOE, mlp_only_layers=[0], decoder_sparse_step=2)),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**GEMMA)),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2)),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**QWEN, max_window_layers=2)),
    "jamba": (hf.JambaForCausalLM, hf.JambaConfig(**JAMBA)),
    "gpt-neo": (hf.GPTNeoForCausalLM, hf.GPTNeoConfig(**NEO)),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig(**SMALL, local_attention=4)),
}
OLD = {"gemma2": {"layer_types": None}, "gemma3": {"layer_types": None, "sliding_window_pattern": 2}}
OLD |= {"qwen2": {"layer_types": None}}
"""What files of earlier years say in place of a list."""


def made(folder, family, seed):
    kind, config = KINDS[family]
    torch.manual_seed(seed)
    module = kind(type(config).from_dict(config.to_dict()))
    stir(module, seed, size=0.1)
    module.save_pretrained(folder)
    found = {key: value for key, value in {**config_of(folder), **OLD.get(family, {})}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def stacked(tmp_path, family, slices):
    found = {name: made(tmp_path / name, family, seed) for seed, name in enumerate("ab")}
    models = {name: str(path) for name, path in found.items()}
    outside = {"first": "a", "last": "b"}
    recipe = {"models": models, "merge": {"method": "passthrough"}, "slices": slices, "outside": outside}
    return recipe, {name: opened(path, KINDS[family][0])[0] for name, path in found.items()}


@pytest.mark.parametrize(
    ("family", "slices", "order", "changes"),
    [
        ("deepseek", [{"a": [1, 3]}, {"b": [3, 4]}], "a1 a2 b3", {"first_k_dense_replace": 1}),
        ("deepseek", [{"a": [0, 2]}, {"b": [0, 3]}], "a0 a1 b0 b1 b2", {"first_k_dense_replace": 4}),
        (
            "qwen3-moe",
            [{"a": [1, 4]}, {"b": [1, 2]}],
            "a1 a2 a3 b1",
            {"mlp_only_layers": [1], "decoder_sparse_step": 1},
        ),
        ("gemma2", [{"a": [1, 4]}, {"b": [0, 1]}], "a1 a2 a3 b0", {"layer_types": "full sliding full sliding"}),
        ("gemma3", [{"a": [1, 2]}, {"b": [1, 4]}], "a1 b1 b2 b3", {"layer_types": "full full sliding full"}),
        ("qwen2", [{"a": [2, 4]}, {"b": [1, 2]}], "a2 a3 b1", {"layer_types": "sliding sliding full"}),
        ("jamba", [{"a": [0, 2]}, {"b": [0, 4]}], "a0 a1 b0 b1 b2 b3", {}),
        (
            "gpt-neo",
            [{"a": [1, 3]}, {"b": [3, 4]}],
            "a1 a2 b3",
            {"attention_types": [[["local", "global", "local"], 1]], "attention_layers": ["local", "global", "local"]},
        ),
        ("modernbert", [{"a": [0, 2]}, {"b": [2, 3]}], "a0 a1 b2", {}),
    ],
)
def test_layers_keep_their_kind(family, slices, order, changes, tmp_path):
    recipe, modules = stacked(tmp_path, family, slices)
    result = mergetool.run(recipe, output=tmp_path / "out")
    kind, config = KINDS[family]
    module, info = opened(result.path, kind)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    layers = [(each[0], int(each[1:])) for each in order.split()]
    if isinstance(changes.get("layer_types"), str):
        changes = {"layer_types": [f"{each}_attention" for each in changes["layer_types"].split()]}
    elif getattr(config, "layer_types", None) and family == "modernbert":
        changes = {"layer_types": [modules[model].config.layer_types[layer] for model, layer in layers]}
    count = "num_layers" if family == "gpt-neo" else "num_hidden_layers"
    like = type(config).from_dict({**modules["a"].config.to_dict(), **changes, count: len(layers)})
    like._experts_implementation = "eager"
    other = kind(like).double().eval()
    row = "transformer.h" if family == "gpt-neo" else "model.layers"
    state = put_together(modules["a"], row, layers, modules)
    wanted = {"norm", "ln_f", "final_layernorm", "final_norm"} | (set() if like.tie_word_embeddings else {"lm_head"})
    ends = [name for name in state if name.split(".")[-2] in wanted]
    state |= {name: modules["b"].state_dict()[name] for name in ends}
    other.load_state_dict(state, strict=family != "modernbert")
    if family != "modernbert":
        torch.testing.assert_close(logits(module, words()), logits(other, words()), rtol=0, atol=1e-4)
    assert all(getattr(module.config, key) == value for key, value in changes.items() if key != "attention_types")


@pytest.mark.parametrize(
    ("family", "slices", "what", "mended"),
    [
        (
            "deepseek",
            [{"a": [2, 4]}, {"b": [0, 1]}],
            r"has no experts, though one below",
            [{"b": [0, 1]}, {"a": [2, 4]}],
        ),
        ("jamba", [{"a": [1, 3]}, {"b": [0, 1]}], r"attn_layer_period: 2", [{"a": [0, 2]}, {"b": [2, 4]}]),
        ("modernbert", [{"a": [1, 3]}, {"b": [1, 2]}], r"layer 0.* attn_norm", [{"a": [0, 2]}, {"b": [1, 2]}]),
        ("modernbert", [{"a": [0, 3]}, {"b": [0, 1]}], r"layer 0.* attn_norm", [{"a": [0, 3]}, {"b": [1, 2]}]),
    ],
)
def test_kinds_that_config_cannot_say_are_refused(family, slices, what, mended, tmp_path):
    recipe, _ = stacked(tmp_path, family, slices)
    with pytest.raises(PlanError, match=what):
        mergetool.plan(recipe)
    assert mergetool.plan({**recipe, "slices": mended}).num_tensors


def test_layers_that_share_keys_or_count_themselves_are_refused(tmp_path):
    recipe, _ = stacked(tmp_path, "gemma3", [{"a": [0, 3]}, {"b": [0, 1]}])
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_kv_shared_layers": 2}))
    with pytest.raises(PlanError, match="num_kv_shared_layers: 2"):
        mergetool.plan(recipe)


def test_layers_for_further_tokens_are_no_layers_of_the_row(tmp_path):
    recipe, modules = stacked(tmp_path, "deepseek", [{"a": [0, 4]}, {"b": [2, 4]}])
    for name in "ab":
        path = tmp_path / name / "model.safetensors"
        state = load_file(path)
        more = {key.replace(".3.", ".4."): value.clone() for key, value in state.items() if "layers.3." in key}
        save_file(state | more, path, {"format": "pt"})
        change_config(tmp_path / name, num_nextn_predict_layers=1)
    result = mergetool.run(recipe, output=tmp_path / "out")
    config = config_of(result.path)
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 0)
    module, info = opened(result.path, KINDS["deepseek"][0])
    assert not info["missing_keys"]
    name = "model.layers.{}.self_attn.o_proj.weight"
    torch.testing.assert_close(
        module.state_dict()[name.format(5)], modules["b"].state_dict()[name.format(3)], rtol=0, atol=1e-6
    )
    recipe["slices"][1] = {"b": [3, 5]}
    with pytest.raises(PlanError, match="layer 4 is asked for, and model 'b' has layers 0 to 3"):
        mergetool.plan(recipe)


def test_layers_of_two_kinds_in_one_mean_are_told(tmp_path):
    recipe, _ = stacked(tmp_path, "gemma2", [{"a": [0, 3], "b": [1, 4]}])
    plan = mergetool.plan({**recipe, "merge": {"method": "linear"}})
    told = next(each for each in plan.warnings if "is merged from" in each)
    assert "layer 0 of a (sliding_attention) and layer 1 of b (full_attention)" in told
    assert "2 more are so" in told
    recipe["slices"] = [{"a": [0, 2], "b": [2, 4]}]
    assert not any(
        "is merged from" in each for each in mergetool.plan(recipe | {"merge": {"method": "linear"}}).warnings
    )
