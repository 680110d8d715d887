"""What a mixture of experts looks like on the disk: names of its tensors and its config.json, by the family.

Dense language models of the Llama kind have a gated MLP in each layer. In a mixture several such MLPs stand in its
place, and a gate (one row for each of them) chooses for every token. All else stays as it is:

    dense         model.layers.0.mlp.up_proj.weight
    mixtral       model.layers.0.block_sparse_moe.experts.3.w3.weight       .block_sparse_moe.gate.weight
    qwen2-moe     model.layers.0.mlp.experts.3.up_proj.weight               .mlp.gate.weight, .mlp.shared_expert...
    qwen3-moe     model.layers.0.mlp.experts.3.up_proj.weight               .mlp.gate.weight
    deepseek      model.layers.0.mlp.experts.3.up_proj.weight               .mlp.gate.weight, .mlp.shared_experts...

These are the names that checkpoints on the Hub have; transformers fuses the experts of a layer when it loads them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
MLP = re.compile(rf"(?P<layer>model\.layers\.(?P<number>\d+))\.mlp\.(?P<leaf>{GATE}|{UP}|{DOWN})\.weight")
"""The MLP of a dense model."""
LAYER = re.compile(r"model\.layers\.(\d+)\..+")
_DOWN = re.compile(rf"experts?\.(\d+\.)?({DOWN}|w2)\.weight$")
_BIAS = re.compile(r"\.self_attn\.([qkvo]_proj)\.bias$")

EMPTY_WIDTH = 64
"""Width of a shared expert that says nothing, in a family that cannot do without one."""
_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base--"
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
}
"""What a config.json of a dense family means where it does not say: mixtures mean something else."""
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
"""The first and the last token of models of the types llama and mistral that do not say."""
_ALL_LEAVE_OUT = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
BASES = tuple(_LEFT_OUT)
"""Model types that mixtures can be made of."""


@dataclass(frozen=True)
class Mixture:
    """A family of mixtures."""

    name: str
    bases: tuple[str, ...]
    """Model types that it can be made of: all but their MLPs is the same."""
    block: str = "mlp"
    leaves: Mapping[str, str] = field(default_factory=dict)
    """What it calls the matrices of an expert, where a dense model calls them otherwise."""
    shared: str | None = None
    """What it calls an expert that every token goes through."""
    gated: bool = False
    """Whether that one has a gate of its own, and is always there."""
    biases: frozenset[str] = frozenset()
    """Projections of attention that may have a bias."""
    windows: bool = False
    """Whether its attention can be kept to a window, in every layer."""
    foreign: bool = False
    """Whether its network is code on the Hub, which reads config.json as it was written years ago."""

    def gate(self, layer: str) -> str:
        """The matrix with one row for every expert."""
        return f"{layer}.{self.block}.gate.weight"

    def expert(self, layer: str, number: int, leaf: str) -> str:
        return f"{layer}.{self.block}.experts.{number}.{self.leaves.get(leaf, leaf)}.weight"

    def shared_expert(self, layer: str, leaf: str) -> str:
        return f"{layer}.{self.block}.{self.shared}.{leaf}.weight"

    def shared_gate(self, layer: str) -> str:
        return f"{layer}.{self.block}.{self.shared}_gate.weight"

    def takes(self, name: str) -> bool:
        """Whether it has a place for a tensor of a dense model that is in no MLP."""
        bias = _BIAS.search(name)
        return ".mlp." not in name and (bias is None or bias[1] in self.biases)


_SOME = frozenset(("q_proj", "k_proj", "v_proj"))
MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture(
            "mixtral",
            ("llama", "mistral"),
            block="block_sparse_moe",
            leaves={GATE: "w1", DOWN: "w2", UP: "w3"},
            windows=True,
        ),
        Mixture("qwen2-moe", ("qwen2", "llama", "mistral"), shared="shared_expert", gated=True, biases=_SOME),
        Mixture("qwen3-moe", ("qwen3",), biases=_SOME | {"o_proj"}),
        Mixture("deepseek", ("llama", "mistral"), shared="shared_experts", biases=_SOME | {"o_proj"}, foreign=True),
    )
}


def fitting(model_type: str, *, shared: bool) -> Mixture | None:
    """The family that models of a type are made into where nobody says another."""
    fits = [each for each in MIXTURES.values() if model_type in each.bases and (each.shared or not shared)]
    return fits[0] if fits else None


def ends_expert(name: str) -> bool:
    """Whether a tensor is the last matrix of an expert: its factor is one of all that the expert says."""
    return bool(_DOWN.search(name))


def mixture_config(mixture: Mixture, base: Config, *, experts: int, chosen: int, shared: bool) -> dict[str, Any]:
    """Keys of config.json in which a mixture differs from its base, or says what the base left unsaid."""
    width = base["intermediate_size"]
    said = {**_ALL_LEAVE_OUT, **_LEFT_OUT[str(base["model_type"])]}
    if "rope_parameters" not in base:
        said["rope_theta"] = 10000.0
    if base["model_type"] == "llama":
        said["num_key_value_heads"] = base["num_attention_heads"]
    own = {key: value for key, value in said.items() if base.get(key) is None}
    sizes = {"num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": True, "decoder_sparse_step": 1}
    names = {
        "mixtral": {"num_local_experts": experts},
        "qwen2-moe": {**sizes, **_shared_width(width, shared=shared), "qkv_bias": base["model_type"] == "qwen2"},
        "qwen3-moe": {**sizes, "mlp_only_layers": []},
        "deepseek": {
            "n_routed_experts": experts,
            "n_shared_experts": 1 if shared else None,
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
            "scoring_func": "softmax",
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            **_flat_rotation(base),
            **{key: token for key, token in _ENDS.items() if key not in base},
            "auto_map": {
                "AutoConfig": f"{_DEEPSEEK}configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{_DEEPSEEK}modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{_DEEPSEEK}modeling_deepseek.DeepseekForCausalLM",
            },
        },
    }
    return {**own, **_KINDS[mixture.name], **names[mixture.name], "num_experts_per_tok": chosen}


_KINDS = {
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    "qwen2-moe": {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]},
    "qwen3-moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
    "deepseek": {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]},
}


def _shared_width(width: int, *, shared: bool) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": width if shared else EMPTY_WIDTH, "mlp_only_layers": []}


def rotation_of(base: Config) -> tuple[str, Config]:
    """How positions are scaled in a dense model, and with which numbers, wherever its config.json says so."""
    told = base.get("rope_parameters") or base.get("rope_scaling") or {}
    return str(told.get("rope_type") or told.get("type") or "default"), told


def _flat_rotation(base: Config) -> dict[str, Any]:
    """The same in the keys that older code reads."""
    kind, told = rotation_of(base)
    theta = told.get("rope_theta", base.get("rope_theta", 10000.0))
    scaling = None if kind == "default" else {"type": kind, "factor": told.get("factor", 1.0)}
    return {"rope_theta": theta, "rope_scaling": scaling}


def window_of(base: Config) -> int | None:
    """To how many tokens attention is kept in a dense model; None where it sees all."""
    model_type = str(base["model_type"])
    if model_type.startswith("qwen") and not base.get("use_sliding_window"):
        return None
    default = _LEFT_OUT[model_type].get("sliding_window", 4096)
    window = base.get("sliding_window", default)
    return window if isinstance(window, int) else None
