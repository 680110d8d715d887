"""Every family file tells the truth: random elements of all its groups leave real networks as they were."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mergetool.arch.apply import transform
from mergetool.arch.match import resolve
from mergetool.arch.verify import failures, prove, runner
from mergetool.kernels.permute import Element
from tests.arch.networks import (
    MLP,
    ResNetCifar,
    ResNetTorchvision,
    TimmViT,
    randomised,
    transformer,
    vgg,
)
from tests.turns import some


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


MODULES = {
    "mlp": (MLP, "mlp", torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), {}),
    "mlp-norm": (lambda: MLP(norm=True), "mlp", torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), {}),
    "vgg": (lambda: vgg(batch_norm=False), "vgg", images(4), {}),
    "vgg-bn": (vgg, "vgg", images(4), {}),
    "resnet-option-a": (ResNetCifar, None, images(8), {}),
    "resnet-option-b": (lambda: ResNetCifar("B"), None, images(8), {}),
    "resnet-torchvision": (ResNetTorchvision, None, images(32), {}),
    "resnet-bottleneck": (lambda: ResNetTorchvision(bottleneck=True), None, images(32), {}),
    "timm-vit": (TimmViT, None, images(8), {"num_heads": 3}),
    "timm-vit-odd": (lambda: TimmViT(dim=20, heads=5), None, images(8), {"num_heads": 5}),
}

TRANSFORMERS = {
    "vit": ("ViTForImageClassification", {}),
    "vit-headless": ("ViTModel", {}),
    "bert-headless": ("BertModel", {}),
    "bert-sequences": ("BertForSequenceClassification", {}),
    "bert-tokens": ("BertForTokenClassification", {}),
    "bert-masked": ("BertForMaskedLM", {}),
    "bert-pretraining": ("BertForPreTraining", {}),
    "bert-questions": ("BertForQuestionAnswering", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "gpt2-headless": ("GPT2Model", {}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-biases": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-one-kv-head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-no-groups": ("LlamaForCausalLM", {"num_attention_heads": 3}),
    "llama-odd-groups": ("LlamaForCausalLM", {"num_attention_heads": 15, "num_key_value_heads": 5, "hidden_size": 30}),
    "llama-headless": ("LlamaModel", {}),
    "llama-classifier": ("LlamaForSequenceClassification", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-headless": ("Qwen3Model", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
}


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def single_precision_change(run, weights, spec):
    moved = transform(weights, spec, Element.random(spec.spaces, torch.Generator().manual_seed(3)))
    before, after = run(weights), run(moved)
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("case", MODULES)
def test_a_network_keeps_its_outputs_under_every_group_of_its_family(case):
    make, architecture, inputs, config = MODULES[case]
    module = randomised(make())
    weights = module.state_dict()
    spec = resolve(architecture, shapes(weights), config)
    assert spec.groups
    assert failures(runner(module, inputs), weights, spec) == ()
    assert prove(runner(module, inputs), weights, spec) < 1e-10

    def single(values):
        with torch.no_grad():
            return torch.func.functional_call(module, dict(values), (inputs,))

    assert single_precision_change(single, weights, spec) < 1e-5


@pytest.mark.parametrize("case", some(TRANSFORMERS))
def test_a_saved_transformer_keeps_its_outputs_under_every_group_of_its_family(case, tmp_path):
    name, changes = TRANSFORMERS[case]
    model, batch = transformer(name, **changes)
    weights = model.state_dict()
    config = model.config.to_dict()
    spec = resolve(None, shapes(weights), config)
    assert spec.groups
    assert failures(runner(model, **batch), weights, spec) == ()
    assert prove(runner(model, **batch), weights, spec) < 1e-10

    # The file: other names than the module's for some models, and no second name of tied tensors.
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    told = json.loads((tmp_path / "config.json").read_text())
    in_file = resolve(None, shapes(stored), told)
    assert [group.kind for group in in_file.groups] == [group.kind for group in spec.groups]
    element = Element.random(in_file.spaces, torch.Generator().manual_seed(3))
    moved = type(model).from_pretrained(None, config=model.config, state_dict=transform(stored, in_file, element))
    with torch.no_grad():
        before, after = model(**batch)[0], moved.eval()(**batch)[0]
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2"])
def test_rms_norm_streams_are_signed_and_grouped_heads_are_nested(case):
    name, changes = TRANSFORMERS[case]
    model, _ = transformer(name, **changes)
    spec = resolve(None, shapes(model.state_dict()), model.config.to_dict())
    assert spec.family == case
    groups = {group.name: group for group in spec.groups}
    assert groups["residual"].kind == "signed"
    nested = {space.name: (space.size, space.within) for space in groups["kv.0"].spaces}
    assert nested == {"kv.0": (3, None), "q.0": (2, "kv.0"), "vo.0": (4, "kv.0")}
    assert spec.tensors["model.layers.1.mlp.up_proj.weight"].depth == (1, 2)
    assert spec.axes_in("vocab") == (("lm_head.weight", 0), ("model.embed_tokens.weight", 0))


def test_layer_norm_streams_may_flip_only_as_a_whole():
    model, _ = transformer("GPT2LMHeadModel")
    spec = resolve(None, shapes(model.state_dict()), model.config.to_dict())
    assert {group.name: group.kind for group in spec.groups} == {
        "residual": "flip",
        "head.0": "nested",
        "head.1": "nested",
        "ffn.0": "permutation",
        "ffn.1": "permutation",
    }
    assert spec.tied == (("lm_head.weight", "transformer.wte.weight"),)
    assert "lm_head.weight" not in spec.layouts()
    assert "lm_head.weight" in spec.layouts(matched=False)


def test_the_stream_of_a_headless_network_is_its_output_and_stays():
    model, _ = transformer("BertModel")
    spec = resolve(None, shapes(model.state_dict()), model.config.to_dict())
    assert [group.name for group in spec.groups] == ["head.0", "head.1", "ffn.0", "ffn.1"]


def test_running_statistics_move_but_are_not_matched():
    weights = ResNetCifar().state_dict()
    spec = resolve(None, shapes(weights))
    assert "bn1.running_var" in spec.layouts(matched=False)
    assert "bn1.running_var" not in spec.layouts()
    assert spec.tensors["bn1.num_batches_tracked"].axes == ()
    assert spec.tensors["layer2.1.conv1.weight"].depth == (3, 6)


def test_a_padding_shortcut_keeps_the_old_channels_in_the_middle():
    spec = resolve(None, shapes(ResNetCifar(width=8).state_dict()))
    layout = spec.tensors["linear.weight"].axes[1]
    assert [(part[0].size, part[0].space) for part in layout] == [
        (8, "stage.3.front"),
        (4, "stage.2.front"),
        (8, "stage.0"),
        (4, "stage.2.back"),
        (8, "stage.3.back"),
    ]


def test_a_projecting_shortcut_gives_the_stage_channels_of_its_own():
    spec = resolve(None, shapes(ResNetCifar("B").state_dict()))
    layout = spec.tensors["linear.weight"].axes[1]
    assert [(part[0].size, part[0].space) for part in layout] == [(32, "stage.3")]


def test_timm_names_tell_the_number_of_heads():
    weights = TimmViT(dim=48, heads=12).state_dict()
    spec = resolve(None, shapes(weights), {"architecture": "vit_base_patch16_224"})
    assert spec.spaces["head.0"].size == 12
    assert spec.spaces["qk.0"].size == 4
