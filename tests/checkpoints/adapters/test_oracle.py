"""Models with adapters, tensor by tensor against peft's own merge_and_unload."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from torch import nn

from tests.checkpoints.adapters.peft_oracle import LLAMA, SMALL, assert_merged_as_by_peft, train

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MOE = {**LLAMA, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, **MLA}
T5 = {
    "vocab_size": 61,
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}


def llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, **more))


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2(**more: Any) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, **more))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=32))


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**MOE))


def gpt_oss() -> nn.Module:
    more = {"intermediate_size": 32, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**{**MOE, **more}))


def gemma3() -> nn.Module:
    text = {**LLAMA, "head_dim": 8}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5))


class Net(nn.Module):
    """Layers that no transformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv1 = nn.Conv1d(3, 4, 2)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.point = nn.Conv2d(3, 4, 1)
        self.linear = nn.Linear(4, 4)


Case = tuple[Callable[[], nn.Module], dict[str, Any]]
PLAIN: dict[str, Case] = {
    "plain": (llama, {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}),
    "excluded": (llama, {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "mica": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "orthogonal": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "eva": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "eva"}),
    "velora": (llama, {"target_modules": ["q_proj"], "velora_config": VeloraConfig(num_groups=4)}),
    "monteclora": (llama, {"target_modules": ["q_proj"], "monteclora_config": MontecloraConfig()}),
    "gemma3": (gemma3, {"target_modules": ["q_proj", "fc1", "embed_tokens"]}),
    "t5": (t5, {"target_modules": ["q", "v", "shared", "wo"]}),
    "clip": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=SMALL, vision_config=VISION)),
        {"target_modules": ["q_proj"]},
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)),
        {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"], "use_dora": True},
    ),
}
TRANSPOSED: dict[str, Case] = {
    "all": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "square beside linear": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": False},
    ),
    "dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding": (gpt2, {"target_modules": ["wte", "c_attn"]}),
    "biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
}
KINDS: dict[str, Case] = {
    "dora": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "dora of embeddings": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora, biases, stabilised": (
        bert,
        {"target_modules": ["query", "dense"], "use_dora": True, "use_rslora": True, "bias": "lora_only"},
    ),
    "convolutions, attention": (
        Net,
        {"target_modules": ["conv1", "conv2", "conv3", "point", "attention"], "r": 2, "bias": "lora_only"},
    ),
    "dora of convolutions": (
        Net,
        {"target_modules": ["conv1", "conv2", "conv3", "point", "linear"], "r": 2, "use_dora": True},
    ),
    "bias of B": (Net, {"target_modules": ["conv2", "linear"], "r": 2, "lora_bias": True}),
    "all biases, tied head": (bert, {"target_modules": ["query", "decoder"], "bias": "all"}),
    "tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [1]}},
    ),
    "attention by a pattern": (Net, {"target_modules": ["attention"], "rank_pattern": {"attention": 3}}),
    "own bias of a tied head": (bert, {"target_modules": ["decoder"], "bias": "lora_only"}),
    "resnet": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
        {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    ),
}
TIED: dict[str, Case] = {
    "head": (tied, {"target_modules": ["lm_head"]}),
    "embeddings": (tied, {"target_modules": ["embed_tokens"]}),
    "embeddings, kept tied": (tied, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "embeddings, kept tied, of another rank than the head's": (
        tied,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "rank_pattern": {"embed_tokens": 5}},
    ),
    "embeddings, kept tied, with a rank of the head": (
        tied,
        {
            "target_modules": ["embed_tokens"],
            "ensure_weight_tying": True,
            "use_rslora": True,
            "rank_pattern": {"lm_head": 5},
            "alpha_pattern": {"lm_head": 3},
        },
    ),
    "both": (tied, {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora": (tied, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "saved head": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved embeddings": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved embeddings, kept tied": (
        tied,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved both": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved embeddings, head": (tied, {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}),
    "saved head with a bias": (bert, {"target_modules": ["query"], "modules_to_save": ["decoder"]}),
    "gpt2": (gpt2, {"target_modules": ["lm_head"]}),
    "gpt2, saved embeddings": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "distilbert": (
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=61, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
        ),
        {"target_modules": ["vocab_projector"]},
    ),
    "t5, saved head": (t5, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
}
MIXTURES: dict[str, Case] = {
    "mixtral": (mixtral, {"target_modules": ["q_proj", "gate"], "target_parameters": EXPERTS}),
    "patterns": (
        mixtral,
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.gate_up_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "use_rslora": True,
        },
    ),
    "a router's parameter": (mixtral, {"target_modules": [], "target_parameters": ["gate.weight"]}),
    "qwen3": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MOE)),
        {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "gate.weight"]},
    ),
    "qwen2": (
        lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=20)),
        {"target_modules": ["shared_expert_gate"], "target_parameters": EXPERTS[1:]},
    ),
    "deepseek": (
        lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK, first_k_dense_replace=1)),
        {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    ),
    "gpt-oss: square, (in, out)": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}
CASES = {
    f"{kind}: {name}": case
    for kind, cases in (("", PLAIN), ("conv1d", TRANSPOSED), ("kind", KINDS), ("tied", TIED), ("mixture", MIXTURES))
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_equals_pefts_own_merge(case: str, tmp_path: Path) -> None:
    model, settings = CASES[case]
    torch.manual_seed(1)
    assert_merged_as_by_peft(train(tmp_path, model(), **settings))
