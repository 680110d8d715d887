"""Tiny classifiers of any class of transformers, as people fine-tune them: a base, and experts with their own heads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH = 32, 2, 2, 60, 8

# What makes any config small: those of these that it has. Names of one size, all together.
_SIZES: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size d_model n_embd embedding_size dim emb_dim embed_dim d_latents word_embed_proj_dim"),
    (WIDTH, "moe_shared_expert_intermediate_size true_hidden_size expert_hidden_size lm_head_hidden_size"),
    (2 * WIDTH, "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner feed_forward_size"),
    (2 * WIDTH, "moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size max_position_embeddings"),
    (2 * WIDTH, "n_positions n_ctx max_seq_len hidden_dim"),
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads"),
    (HEADS, "num_key_value_heads num_self_attention_heads num_cross_attention_heads n_group num_experts_per_tok"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts topk_group_"),
    (WIDTH // HEADS, "head_dim d_kv d_head kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (WIDTH // HEADS, "query_pre_attn_scalar q_lora_rank kv_lora_rank"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
)


def tiny_config(kind: Any, **more: Any) -> Any:
    """A small config for a class; `more` goes last."""
    known = kind.config_class().to_dict()
    sizes = {name: size for size, names in _SIZES for name in names.split() if name in known}
    sizes |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    if known.get("is_encoder_decoder"):
        sizes["decoder_start_token_id"] = 2
    return kind.config_class(**{**sizes, **more})


def text_inputs(num_samples: int = 5, *, seed: int = 1, side: str = "right", ends: bool = True) -> dict[str, Tensor]:
    """Token ids of unequal lengths, padded with 1 on one side, each sample with one token 3 (the end) last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (num_samples, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(num_samples):
        length = LENGTH - row % 4
        kept = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        mask[row] = 0
        mask[row, kept] = 1
        if ends:
            ids[row, kept.stop - 1] = 3
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def image_inputs(num_samples: int = 5, size: int = 16) -> dict[str, Tensor]:
    """Square images."""
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(num_samples, 3, size, size, generator=generator)}


def audio_inputs(num_samples: int = 4) -> dict[str, Tensor]:
    """Spectrograms for Whisper."""
    generator = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(num_samples, 80, 100, generator=generator)}


def save_experts(
    folder: Path, kind: Any, config: Any, base: Any, *, tasks: str = "ab", scale: float = 0.1, **labels: Any
) -> dict[str, Path]:
    """Save a base of class `base`, and experts of class `kind` around it, whose every tensor moved.

    `labels`: how many classes each task has (2 for question answering).
    """
    torch.manual_seed(0)
    network = _with_random_vectors(base(config))
    network.save_pretrained(folder / "base")
    for place, task in enumerate(tasks):
        torch.manual_seed(10 + place)
        own = type(config).from_dict({**config.to_dict(), "id2label": None, "label2id": None})
        own.id2label = {number: f"{task}{number}" for number in range(labels.get(task, 3))}
        own.label2id = {label: number for number, label in own.id2label.items()}
        expert = kind.from_pretrained(folder / "base", config=own)
        _train(expert, scale)
        expert.save_pretrained(folder / task)
    return {name: folder / name for name in ("base", *tasks)}


def _train(expert: Any, scale: float) -> None:
    """Move every tensor, but not the embeddings of padding, which no gradient reaches."""
    padding = {
        id(module.weight): module.padding_idx
        for module in expert.modules()
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
    }
    with torch.no_grad():
        for value in [*expert.parameters(), *expert.buffers()]:
            if value.is_floating_point() and value.numel():
                change = scale * torch.randn_like(value) * value.std(correction=0).clamp_min(0.1)
                if id(value) in padding:
                    change[padding[id(value)]] = 0
                value.add_(change)
        for name, value in expert.named_buffers():
            if name.endswith("running_var"):
                value.abs_()


def _with_random_vectors(model: Any) -> Any:
    """Biases and norms as after training, not all zeros and ones."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim < 2:
                value.add_(0.1 * torch.randn_like(value))
    return model


def expert_answer(folder: Path, kind: Any, inputs: dict[str, Tensor]) -> Any:
    """What transformers itself says."""
    model = kind.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**inputs)
