"""One tiny config for every architecture, the class that people save it with, and inputs for its logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

VOCAB = 64
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """An architecture of the zoo."""

    model: type
    """The class of the checkpoint: its `save_pretrained` wrote the files."""
    config: Callable[..., Any]
    """Makes the config; keywords change it."""
    inputs: Callable[[], Inputs]
    auto: type
    """The class that people open the checkpoint with."""
    text: bool = True
    """Whether a tokenizer lies beside the weights."""


def ids(*shape: int, seed: int = 3, low: int = 3, high: int = VOCAB) -> torch.Tensor:
    """Token ids, away from the special ones; the same every time."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    """Pixels or features."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words() -> Inputs:
    """Two rows of tokens, for a model that reads text."""
    return {"input_ids": ids(2, 9)}


def two_sides() -> Inputs:
    """Tokens for an encoder and for a decoder."""
    return {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5, seed=4)}


def images(size: int = 16) -> Inputs:
    """Two images."""
    return {"pixel_values": noise(2, 3, size, size)}


def _fill(config: type, **defaults: Any) -> Callable[..., Any]:
    return lambda **changes: config(**{**defaults, **changes})


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GEMMA = {**_DECODER, "query_pre_attn_scalar": 4, "sliding_window": 8}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _gemma3(**changes: Any) -> Any:
    text = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"], **changes.pop("text", {})}
    sizes = {"mm_tokens_per_image": 4, "image_token_index": 62, "boi_token_index": 60, "eoi_token_index": 61}
    return hf.Gemma3Config(text_config=text, vision_config=_VISION, **{**sizes, **changes})


def _llava(**changes: Any) -> Any:
    text, vision = hf.LlamaConfig(**_DECODER), hf.CLIPVisionConfig(**_VISION)
    settings = {"image_token_index": 62, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    return hf.LlavaConfig(vision_config=vision, text_config=text, **{**settings, **changes})


def _qwen2_vl(**changes: Any) -> Any:
    text = {**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 4, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 2}
    tokens = {"image_token_id": 62, "video_token_id": 61, "vision_start_token_id": 59, "vision_end_token_id": 60}
    return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **{**tokens, **changes})


def _clip(**changes: Any) -> Any:
    text = {**_ENCODER, "projection_dim": 12, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**_VISION, "projection_dim": 12, **changes.pop("vision", {})}
    return hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, **changes)


def _picture_and_words() -> Inputs:
    tokens = torch.cat([torch.full((2, 4), 62), ids(2, 6, high=58)], dim=1)
    return {"input_ids": tokens, **images(), "token_type_ids": (tokens == 62).long()}


def _llava_inputs() -> Inputs:
    return {"input_ids": torch.cat([torch.full((2, 4), 62), ids(2, 6, high=58)], dim=1), **images()}


_T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
_WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
_DISTIL = {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
_GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_CAUSAL = hf.AutoModelForCausalLM
_MASKED = hf.AutoModelForMaskedLM
_SEQ2SEQ = hf.AutoModelForSeq2SeqLM
_SEEING = hf.AutoModelForImageTextToText


def _whisper_inputs() -> Inputs:
    return {"input_features": noise(2, 8, 32), "decoder_input_ids": ids(2, 5, seed=4)}


def _clip_inputs() -> Inputs:
    return {**words(), **images()}


FAMILIES = {
    "llama": Family(hf.LlamaForCausalLM, _fill(hf.LlamaConfig, **_DECODER), words, _CAUSAL),
    "qwen2-tied": Family(
        hf.Qwen2ForCausalLM, _fill(hf.Qwen2Config, **_DECODER, tie_word_embeddings=True), words, _CAUSAL
    ),
    "qwen2": Family(hf.Qwen2ForCausalLM, _fill(hf.Qwen2Config, **_DECODER, tie_word_embeddings=False), words, _CAUSAL),
    "qwen3": Family(hf.Qwen3ForCausalLM, _fill(hf.Qwen3Config, **_DECODER), words, _CAUSAL),
    "qwen3-moe": Family(hf.Qwen3MoeForCausalLM, _fill(hf.Qwen3MoeConfig, **_MOE), words, _CAUSAL),
    "gemma2": Family(hf.Gemma2ForCausalLM, _fill(hf.Gemma2Config, **_GEMMA), words, _CAUSAL),
    "gemma3-text": Family(hf.Gemma3ForCausalLM, _fill(hf.Gemma3TextConfig, **_GEMMA), words, _CAUSAL),
    "gemma3": Family(hf.Gemma3ForConditionalGeneration, _gemma3, _picture_and_words, _SEEING),
    "llava": Family(hf.LlavaForConditionalGeneration, _llava, _llava_inputs, _SEEING),
    "qwen2-vl": Family(hf.Qwen2VLForConditionalGeneration, _qwen2_vl, words, _SEEING),
    "phi3": Family(hf.Phi3ForCausalLM, _fill(hf.Phi3Config, **_DECODER), words, _CAUSAL),
    "mixtral": Family(hf.MixtralForCausalLM, _fill(hf.MixtralConfig, **_DECODER, num_local_experts=4), words, _CAUSAL),
    "gpt2": Family(hf.GPT2LMHeadModel, _fill(hf.GPT2Config, **_GPT2), words, _CAUSAL),
    "bert": Family(hf.BertForMaskedLM, _fill(hf.BertConfig, **_ENCODER), words, _MASKED),
    "bert-classifier": Family(
        hf.BertForSequenceClassification,
        _fill(hf.BertConfig, **_ENCODER, num_labels=3),
        words,
        hf.AutoModelForSequenceClassification,
    ),
    "bert-bare": Family(hf.BertModel, _fill(hf.BertConfig, **_ENCODER), words, hf.AutoModel),
    "roberta": Family(
        hf.RobertaForMaskedLM, _fill(hf.RobertaConfig, **(_ENCODER | {"pad_token_id": 1})), words, _MASKED
    ),
    "distilbert": Family(hf.DistilBertForMaskedLM, _fill(hf.DistilBertConfig, **_DISTIL), words, _MASKED),
    "albert": Family(hf.AlbertForMaskedLM, _fill(hf.AlbertConfig, **_ENCODER, embedding_size=8), words, _MASKED),
    "t5": Family(hf.T5ForConditionalGeneration, _fill(hf.T5Config, **_T5), two_sides, _SEQ2SEQ),
    "bart": Family(hf.BartForConditionalGeneration, _fill(hf.BartConfig, **_BART), two_sides, _SEQ2SEQ),
    "vit": Family(
        hf.ViTForImageClassification,
        _fill(hf.ViTConfig, **_VISION, num_labels=5),
        images,
        hf.AutoModelForImageClassification,
        text=False,
    ),
    "clip": Family(hf.CLIPModel, _clip, _clip_inputs, hf.AutoModel),
    "whisper": Family(
        hf.WhisperForConditionalGeneration,
        _fill(hf.WhisperConfig, **_WHISPER),
        _whisper_inputs,
        hf.AutoModelForSpeechSeq2Seq,
        text=False,
    ),
}
