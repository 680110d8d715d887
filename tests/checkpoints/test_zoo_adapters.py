"""Adapters that PEFT wrote, merged with other fine-tunes, against PEFT's own merge_and_unload."""

import warnings

import peft
import pytest
import torch
import transformers as hf

from tests.checkpoints.recipes import recipe_of
from tests.zoo.advice import outcomes
from tests.zoo.check import assert_merged
from tests.zoo.families import FAMILIES
from tests.zoo.oracle import opened, task_arithmetic

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "dense"],
    "t5": ["q", "wo"],
    "gemma3": r".*language_model.*q_proj",
    "vit": ["q_proj", "o_proj"],
    "qwen2-vl": r".*language_model.*q_proj",
    "qwen3-moe": ["q_proj", "o_proj"],
    "whisper": ["q_proj", "fc1"],
}


def adapter(zoo, name, base, *, model=None, **settings):
    """An adapter on `base`, whose factors are random, not zero."""
    model = model or FAMILIES[name].model

    def make(folder):
        made = model.from_pretrained(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(made, peft.LoraConfig(r=3, lora_alpha=6, **settings))
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for key, value in wrapped.named_parameters():
                    if "lora_" in key:
                        value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            wrapped.save_pretrained(folder)

    return zoo.made(f"{base.name}-adapter-{name}-{model.__name__}-{len(settings)}", make)


def adapted_state(base, lora, model):
    """The tensors of the base with the adapter merged in by PEFT, in float64, under the module's names."""
    module, _ = opened(base, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(module, lora).double().merge_and_unload().state_dict()


def recipe_with(base, lora, other):
    recipe = recipe_of(base, base, other)
    recipe["models"]["a"] = {"source": str(base), "adapters": [str(lora)]}
    return recipe


RENAMED = ("gemma3", "vit", "qwen2-vl")


@pytest.mark.parametrize("name", list(TARGETS))
def test_an_adapter_is_merged_as_peft_merges_it(zoo, name, tmp_path):
    family, base, b = FAMILIES[name], zoo.base(name), zoo.tuned(name, 2)
    lora = adapter(zoo, name, base, target_modules=TARGETS[name])
    states = [zoo.state(base, family.model), adapted_state(base, lora, family.model), zoo.state(b, family.model)]
    for result in outcomes(recipe_with(base, lora, b), tmp_path / "out"):
        assert_merged(result.path, family.auto, states[0], states[1:], task_arithmetic(0.5), family.inputs())


def test_an_adapter_of_the_whole_model_fits_a_base_without_a_head(zoo, tmp_path):
    """PEFT names `model.layers` of a LlamaForCausalLM, and files of a LlamaModel say `layers`."""
    whole, b = zoo.base("llama"), zoo.tuned("llama", 2)

    def bare(source):
        return zoo.made(
            f"{source.name}-bare", lambda folder: hf.LlamaModel.from_pretrained(source).save_pretrained(folder)
        )

    lora = adapter(zoo, "llama", whole, target_modules=TARGETS["llama"])
    states = [zoo.state(bare(source), hf.LlamaModel) for source in (whole, b)]
    adapted = {
        key.removeprefix("model."): value
        for key, value in adapted_state(whole, lora, hf.LlamaForCausalLM).items()
        if key.startswith("model.")
    }
    for result in outcomes(recipe_with(bare(whole), lora, bare(b)), tmp_path / "out"):
        inputs = FAMILIES["llama"].inputs()
        assert_merged(result.path, hf.AutoModel, states[0], [adapted, states[1]], task_arithmetic(0.5), inputs)
