"""Layers of every kind of network, cut, stacked and repeated, against modules put together by hand: logits, counts."""

from dataclasses import dataclass, field

import pytest
import torch
import transformers as hf

import mergetool
from mergetool.arch.ends import ends_of
from mergetool.checkpoints.rows import Outside
from tests.files import LONG
from tests.zoo.build import stir
from tests.zoo.families import FAMILIES, VOCAB, Family, words
from tests.zoo.oracle import logits, opened

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MARIAN = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_MARIAN |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
_MARIAN |= {"pad_token_id": 0, "decoder_start_token_id": 0}
MORE = {
    "falcon": Family(hf.FalconForCausalLM, lambda **c: hf.FalconConfig(**SMALL | c), words, hf.AutoModelForCausalLM),
    "mamba": Family(
        hf.MambaForCausalLM, lambda **c: hf.MambaConfig(**SMALL | {"state_size": 4} | c), words, hf.AutoModelForCausalLM
    ),
    "marian": Family(
        hf.MarianMTModel,
        lambda **c: hf.MarianConfig(**_MARIAN | c),
        FAMILIES["bart"].inputs,
        hf.AutoModelForSeq2SeqLM,
    ),
    "opt": Family(
        hf.OPTForCausalLM,
        lambda **c: hf.OPTConfig(
            **SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32} | c
        ),
        words,
        hf.AutoModelForCausalLM,
    ),
}
KINDS = {**FAMILIES, **MORE}


@dataclass(frozen=True)
class Case:
    """A row of layers: what it is called in the module, what the recipe calls it, and the keys that count it."""

    family: str
    row: str
    counted: tuple[str, ...] = ("num_hidden_layers",)
    key: str = ""
    part: str = ""
    config: dict = field(default_factory=dict)


CASES = [
    Case("gpt2", "transformer.h", ("n_layer",), config={"n_layer": 3}),
    Case("falcon", "transformer.h"),
    Case("mamba", "backbone.layers"),
    Case("opt", "model.decoder.layers"),
    Case("phi3", "model.layers", config={"num_hidden_layers": 3}),
    Case("qwen2-tied", "model.layers", config={"num_hidden_layers": 3}),
    Case("qwen3-moe", "model.layers", config={"num_hidden_layers": 3}),
    Case("mixtral", "model.layers", config={"num_hidden_layers": 3}),
    Case("bert", "bert.encoder.layer", config={"num_hidden_layers": 3}),
    Case("bert-classifier", "bert.encoder.layer", config={"num_hidden_layers": 3}),
    Case("roberta", "roberta.encoder.layer", config={"num_hidden_layers": 3}),
    Case("distilbert", "distilbert.transformer.layer", ("n_layers",), config={"n_layers": 3}),
    Case("vit", "vit.layers", config={"num_hidden_layers": 3}),
    Case("t5", "decoder.block", ("num_decoder_layers",), config={"num_layers": 3}),
    Case("t5", "encoder.block", ("num_layers",), "encoder", config={"num_layers": 3}),
    Case("bart", "model.decoder.layers", ("decoder_layers",), config={"decoder_layers": 3}),
    Case("bart", "model.encoder.layers", ("encoder_layers",), "encoder", config={"encoder_layers": 3}),
    Case("marian", "model.decoder.layers", ("decoder_layers",), "decoder", config={"decoder_layers": 3}),
    Case("whisper", "model.decoder.layers", ("decoder_layers",), config={"decoder_layers": 3}),
    Case("whisper", "model.encoder.layers", ("encoder_layers",), "model.encoder.layers", config={"encoder_layers": 3}),
    Case("llava", "model.language_model.layers", part="text_config"),
    Case("llava", "model.vision_tower.encoder.layers", key="vision", part="vision_config"),
    Case("gemma3", "model.language_model.layers", part="text_config"),
    Case("qwen2-vl", "model.language_model.layers", part="text_config"),
    Case("qwen2-vl", "model.visual.blocks", ("depth",), "visual", "vision_config"),
    Case("clip", "text_model.encoder.layers", key="text", part="text_config"),
    Case("clip", "vision_model.encoder.layers", key="vision_model", part="vision_config"),
]


def made(folder, case, seed):
    kind = KINDS[case.family]
    torch.manual_seed(seed)
    module = kind.model(kind.config(**case.config))
    stir(module, seed, size=0.1)
    module.save_pretrained(folder)
    return folder


def put_together(module, row, layers, others):
    """The tensors of a module whose `layers` are (module, number) each, all else as in `module`."""
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(f"{row}.")}
    first = {name for name in module.state_dict() if "relative_attention_bias" in name and name.startswith(f"{row}.0.")}
    state |= {name: others[layers[0][0]].state_dict()[name] for name in first}
    for number, (model, layer) in enumerate(layers):
        for name, value in others[model].state_dict().items():
            if name.startswith(f"{row}.{layer}.") and name not in first:
                state[f"{row}.{number}.{name.removeprefix(f'{row}.{layer}.')}"] = value
    return state


FEW = ("gpt2", "mamba", "mixtral", "bert", "vit", "t5", "bart", "whisper", "llava", "gemma3", "qwen2-vl", "clip")


@pytest.mark.parametrize(
    "case", [case for case in CASES if LONG or case.family in FEW], ids=lambda case: f"{case.family}-{case.row}"
)
def test_rows_of_layers_are_found_and_counted(case, tmp_path):
    found = {name: made(tmp_path / name, case, seed) for seed, name in enumerate("ab")}
    slices = [{"a": [0, 2]}, {"b": [1, 2]}, {"b": [0, 2]}]
    order = [("a", 0), ("a", 1), ("b", 1), ("b", 0), ("b", 1)]
    recipe = {
        "models": {name: str(path) for name, path in found.items()},
        "merge": {"method": "passthrough"},
        "slices": {case.key: slices} if case.key else slices,
        "outside": {"first": "a", "last": "a"},
    }
    result = mergetool.run(recipe, output=tmp_path / "out")
    several = case.part or case.family in ("t5", "bart", "marian", "whisper")
    assert any("slices are taken to be of" in each for each in result.warnings) == bool(several and not case.key)
    kind = KINDS[case.family]
    modules = {name: opened(path, kind.model)[0] for name, path in found.items()}
    module, info = opened(result.path, kind.model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = type(module.config).from_dict(modules["a"].config.to_dict())
    part = getattr(config, case.part) if case.part else config
    for key in case.counted:
        setattr(part, key, len(order))
    if "layer_types" in part.to_dict():
        part.layer_types = [part.layer_types[layer] for _, layer in order]
    config._experts_implementation = "eager"
    other = kind.model(config).double().eval()
    other.load_state_dict(put_together(modules["a"], case.row, order, modules))
    torch.testing.assert_close(logits(module, kind.inputs()), logits(other, kind.inputs()), rtol=0, atol=1e-4)
    assert logits(module, kind.inputs()).std() > 1e-3


def ends(row, rows, *names, kind=""):
    outside = Outside([row], rows, dict.fromkeys(names, (1,)), kind)
    return [outside.of(name) for name in names]


def test_what_lies_outside_belongs_to_one_end():
    text, eyes = "language_model.model.layers", "vision_tower.transformer.layers"
    assert ends(
        text,
        [text, eyes],
        "vision_tower.ln_pre.weight",
        "vision_tower.ln_post.weight",
        "vision_tower.transformer.layers.0.norm.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.norm.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ) == [*[(text, "first")] * 5, None, *[(text, "last")] * 2]
    names = (
        "embeddings.word_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "vocab_projector.weight",
        "embed_out.weight",
    )
    assert [end for _, end in ends("encoder.layer", ["encoder.layer"], *names)] == ["first", "first", "last", "last"]
    sides = ["decoder.block", "encoder.block"]
    names = "shared.weight", "encoder.block.0.wi.weight", "encoder.final_layer_norm.weight", "lm_head.weight"
    assert [end for _, end in ends(sides[0], sides, *names)] == ["first", "first", "first", "last"]
    assert [end for _, end in ends(sides[1], sides, "decoder.block.0.wi.weight", "lm_head.weight")] == ["last", "last"]


def test_a_known_architecture_lists_its_ends():
    names = {f"model.layers.{i}.self_attn.q_proj.weight": (1,) for i in range(2)}
    found = ends_of(names | {"model.embed_tokens.weight": (1,), "model.norm.weight": (1,)}, "llama")
    assert found == {"model.embed_tokens.weight": "first", "model.norm.weight": "last"}
    assert ends_of({"something.else": (1,)}) == {}
