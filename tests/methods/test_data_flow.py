"""Paths through layers: what a candidate stands for, scales where paths meet, and what is refused."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mergetool
from mergetool import PlanError, RecipeError
from mergetool.checkpoints.stream import KNOWN
from mergetool.recipe import load_recipe
from mergetool.recipe.candidate import candidate_recipe, settled
from mergetool.tensors.folder import open_model
from tests.turns import some
from tests.zoo.build import stir

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0, "n_inner": 24}
SIZES |= dict.fromkeys(("bos_token_id", "eos_token_id"), 1) | {"rotary_dim": 4}
SIZES |= dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), 1e-12)
"""With so small an epsilon norms take all of a scale away."""


def made(folder, kind="llama", **changes):
    sizes = {**SIZES, **changes}
    if kind == "gpt_neo":
        sizes |= {"attention_types": [[["global", "local"], 1], [["global"], 1]], "num_layers": 3, "num_heads": 4}
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    stir(model, 0, size=0.1)
    model.save_pretrained(folder)
    return folder


def recipe(models, **merge):
    named = {name: str(path) for name, path in models.items()}
    return {"models": named, "merge": {"method": "data-flow", "tasks": [{"name": "t"}], **merge}}


def opened(models, **merge):
    loaded = load_recipe(recipe(models, **merge))
    return settled(loaded, {name: open_model(path) for name, path in models.items()})


def slices(asked, values):
    return candidate_recipe(asked, values).document["slices"]


def test_genes_are_blocks_in_the_order_in_which_they_are_lined_up(tmp_path):
    models = {"a": made(tmp_path / "a", num_hidden_layers=5), "b": made(tmp_path / "b")}
    asked = opened(models, block=2)
    space = asked.method.space("ab")
    assert [gene.name for gene in space.genes][:4] == ["a[2:4] #1", "b[0:2] #1", "b[2:3] #1", "a[2:4] #2"]
    assert slices(asked, space.start) == [{"a": [0, 5]}]
    assert slices(asked, (0, 1, 1, 1, 0, 0)) == [{"a": [0, 2]}, {"b": [0, 3]}, {"a": [2, 5]}]
    short = opened(models, block=2, max_layers=6)
    assert slices(short, (0, 1, 1, 1, 0, 0)) == [{"a": [0, 2]}, {"b": [0, 3]}, {"a": [4, 5]}]
    ways = [space.values(space.point(values)) for values in ((0, 0, 0, 1, 0, 1), (1, 0, 1, 0, 0, 0))]
    assert ways == [(True, False, True, False, False, False)] * 2  # one path is one candidate
    deep = opened(models, order="depth", repeats=1)
    names = [gene.name for gene in deep.method.space("ab").genes]
    assert names == ["b[0:1]", "a[1:2]", "b[1:2]", "a[2:3]", "a[3:4]", "b[2:3]"]
    assert "scale of the end" in [gene.name for gene in opened(models, scale=[0.5, 2.0]).method.space("ab").genes]


@pytest.mark.parametrize("kind", some(KNOWN))
def test_a_scale_in_weights_is_a_scale_of_what_enters(kind, tmp_path):
    asked = opened({"a": made(tmp_path / "a", kind)}, scale=[0.5, 2.0], repeats=2)
    path = candidate_recipe(asked, (True, True, 0.6, 1.7, 1.3))  # layers 0 1, again 1, 2
    result = mergetool.run(path, output=tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float64).eval()
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float64).eval()
    core = by_hand.base_model
    row = next(name for name in ("layers", "h") if hasattr(core, name))
    layers = torch.nn.ModuleList(deepcopy(getattr(core, row)[number]) for number in (0, 1, 1, 2))
    layers[2].register_forward_pre_hook(lambda _, given: (1.7 * given[0], *given[1:]))
    setattr(core, row, layers)
    by_hand.config.num_hidden_layers = 4
    if hasattr(by_hand.config, "layer_types"):
        by_hand.config.layer_types = merged.config.layer_types
    words = torch.arange(2, 10)[None]
    logits = [model(words, use_cache=False).logits for model in (merged, by_hand)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert (logits[0] - AutoModelForCausalLM.from_pretrained(tmp_path / "a")(words).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "merge", "what"),
    [
        ({"hidden_size": 32}, {}, "has shape"),
        ({}, {"ends": 2}, "are more than its 3 layers"),
        ({}, {"max_layers": 1}, "has no room"),
    ],
)
def test_models_that_cannot_stand_on_each_other_are_refused(changes, merge, what, tmp_path):
    models = {"a": made(tmp_path / "a"), "b": made(tmp_path / "b", **changes)}
    with pytest.raises(PlanError, match=what):
        mergetool.plan(recipe(models, **merge))


def test_scales_are_refused_where_norms_stand_behind_the_parts(tmp_path):
    models = {"a": made(tmp_path / "a", "olmo2")}
    assert mergetool.plan(recipe(models)).specs
    with pytest.raises(PlanError, match="type 'olmo2' is not known"):
        mergetool.plan(recipe(models, scale=[0.5, 2.0]))
    with pytest.raises(RecipeError, match="from above 0 up to 1"):
        load_recipe(recipe(models, scale=[1.1, 2.0]))
